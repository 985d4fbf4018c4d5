"""Writes docs/results.md and its figures from what is kept of benchmarks/study.py and benchmarks/baselines.py.

    python benchmarks/results.py [--runs DIR] [--baselines DIR] [--split test] [--records DIR] [--output FILE]
      [--readme FILE]

First keeps the finished runs of --runs and --baselines in RECORDS (benchmarks/study_records.py), and holds the claims
against all that is kept. Every number of the page is read from RECORDS. Rows without runs are left out, and claims
about them. Figures lie in a folder beside the page that has its name. The tables of README.md are written
as well (benchmarks/results_summary.py).
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import results_page, results_summary, study, study_records, study_verdicts
from benchmarks.study_claims import claims, tables
from benchmarks.study_records import RECORDS
from recalign_jax.evaluation.report import EVALUATION_FILE
from recalign_jax.files import atomic_file

# What a record says of a run, by where it stands in its study.json, and of a baseline in its metrics.json.
KEPT = {part: part for part in ("bindings", "settings", "cores", "seconds", "steps", "tokens")}
KEPT_OF_BASELINES = {"seconds": "training_seconds", "settings": "method_options"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, help="--output of benchmarks/study.py")
    parser.add_argument("--baselines", type=pathlib.Path, help="--output of benchmarks/baselines.py")
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="of --runs and --baselines")
    parser.add_argument("--records", type=pathlib.Path, default=RECORDS, help="what is kept, of one split")
    parser.add_argument("--output", type=pathlib.Path, default=study.ROOT / "docs" / "results.md")
    parser.add_argument("--readme", type=pathlib.Path, default=study.ROOT / "README.md", help="has the same in short")
    args = parser.parse_args()
    kept = keep(args.runs, args.baselines, args.split, args.records)
    found = study_records.read(args.records, known_rows())
    judged = study_verdicts.judge_all(claims(), found, study_verdicts.read_judged(args.records))
    study_verdicts.write_judged(judged, args.records)

    page, drawn = results_page.render(found, judged, args.output.stem)
    for name, content in drawn.items():
        with atomic_file(args.output.with_suffix("") / name) as aside:
            aside.write_bytes(content)
    with atomic_file(args.output) as aside:
        aside.write_text(page, encoding="utf-8")
    readme = results_summary.replaced(args.readme.read_text(encoding="utf-8"), results_summary.render(found, judged))
    with atomic_file(args.readme) as aside:
        aside.write_text(readme, encoding="utf-8")
    print(json.dumps({"output": str(args.output), "figures": sorted(drawn), **kept}))


# Keeping.


def known_rows() -> list[str]:
    """The rows of the study, and baselines as CORPUS/ROW."""
    return list(dict.fromkeys([*study.ROWS, *(name for table in tables() for name in table.baselines)]))


def keep(
    runs: pathlib.Path | None, conventional: pathlib.Path | None, split: str, records: pathlib.Path
) -> dict[str, list[str]]:
    """Keeps all finished runs of two folders; returns which are `kept` for the first time, and which `replaced`."""
    told: dict[str, list[str]] = {"kept": [], "replaced": []}
    for name in known_rows():
        is_baseline = "/" in name
        folder = conventional and conventional / split / name if is_baseline else runs and runs / name
        for seed in _seeds(folder) if folder else ():
            evaluated = seed if is_baseline else seed / split
            if not (evaluated / EVALUATION_FILE).is_file():
                continue
            source = evaluated / EVALUATION_FILE if is_baseline else seed / study.RECORD
            ran = json.loads(source.read_text(encoding="utf-8"))
            kept = KEPT_OF_BASELINES if is_baseline else KEPT
            about = {"row": name, "seed": int(seed.name), "split": split}
            about |= {part: ran[source] for part, source in kept.items() if source in ran}
            known = (records / name / f"{seed.name}.json").exists()
            study_records.keep(evaluated, about, records)
            told["replaced" if known else "kept"].append(f"{name}/{seed.name}")
    return told


def _seeds(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


if __name__ == "__main__":
    main()
