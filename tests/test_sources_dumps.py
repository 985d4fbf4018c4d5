"""The published dumps: Amazon of three years, every size of MovieLens, Yelp."""

import json
import pathlib
import re
import shlex
import sys
import time
import types

import pytest

from recalign_jax.corpus.records import Interaction, Item, ItemText, RowError
from recalign_jax.corpus.sources import amazon, amazon_metadata, movielens, yelp
from recalign_jax.errors import InputError
from tests import source_files
from tests.corpora import prepared
from tests.source_files import put, read

TEXT_2014 = ItemText(
    "WAWO 15 Color Makeup Palette & Brush", ("Beauty", "Makeup", "Face", "Tools & Accessories"), "WAWO", 12.99
)
TEXT_2018 = ItemText(
    "Aqua Velva After Shave , Ice Blue", ("Beauty & Personal Care", "Shave & Hair Removal"), "Aqua Velva", 1012.5
)
TEXT_2023 = ItemText("Howard LC0008 Leather Conditioner, 8-Ounce", ("All Beauty",), "Howard Products", 9.99)


def amazon_folder(folder: pathlib.Path, year: str, end: str = "", core: str = "_5") -> pathlib.Path:
    reviews, metadata, write = {
        "2014": (source_files.REVIEW_2014, source_files.META_2014, repr),
        "2018": (source_files.REVIEW_2018, source_files.META_2018, json.dumps),
        "2023": (source_files.REVIEW_2023, source_files.META_2023, json.dumps),
    }[year]
    name = {"2014": f"reviews_Beauty{core}.json", "2018": f"All_Beauty{core}.json", "2023": "All_Beauty.jsonl"}[year]
    meta = {"2014": "meta_Beauty.json", "2018": "meta_All_Beauty.json", "2023": "meta_All_Beauty.jsonl"}[year]
    put(folder, name + end, source_files.lines(reviews))
    return put(folder, meta + end, source_files.lines(metadata, write=write))


@pytest.mark.parametrize("core", ["_5", ""])
@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    ("year", "interaction", "text"),
    [
        ("2014", Interaction("A1YJEY40YUW4SE", "7806397051", 1391040000, 1.0), TEXT_2014),
        ("2018", Interaction("A3CIUOJXQ5VDQ2", "B0000530HU", 1472688000, 5.0), TEXT_2018),
        ("2023", Interaction("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B00YQ6X8E0", 1588687728923, 4.0), TEXT_2023),
    ],
)
def test_amazon(tmp_path, year, interaction, text, end, core):
    interactions, items, rejected = read(amazon_folder(tmp_path, year, end, core), open_folder=amazon.open_folder)
    assert interactions == [interaction]
    assert items == [Item(interaction.item_id, text)]
    assert rejected == []


def test_amazon_ratings_alone(tmp_path):
    put(tmp_path, "All_Beauty.csv.gz", source_files.CSV_2023)
    put(tmp_path, "meta_All_Beauty.jsonl", source_files.lines(source_files.META_2023))
    interactions, items, _ = read(tmp_path, open_folder=amazon.open_folder)
    assert interactions == [Interaction("AGKH", "B00YQ6X8E0", 1588687728923, 4.0)]
    assert [item.text for item in items] == [TEXT_2023]


def test_amazon_three_parts_in_order(tmp_path):
    put(tmp_path, "meta_All_Beauty.jsonl.gz", source_files.lines(source_files.META_2023))
    for number, (part, end) in enumerate([("train", ""), ("valid", ".gz"), ("test", "")]):
        with pytest.raises(InputError, match="no reviews of Amazon" if number == 0 else "no part of the three"):
            amazon.open_folder(tmp_path)
        row = source_files.CSV_2023_HISTORY.format(f"B0{number}", 1588687728923 + number)
        put(tmp_path, f"All_Beauty.{part}.csv{end}", row)
    interactions, _, _ = read(tmp_path, open_folder=amazon.open_folder)
    assert [(row.item_id, row.timestamp % 1000) for row in interactions] == [("B00", 923), ("B01", 924), ("B02", 925)]
    assert len(amazon.open_folder(tmp_path).files) == 4


def test_amazon_takes_one_domain_at_a_time(tmp_path):
    amazon_folder(tmp_path / "two", "2014")
    amazon_folder(tmp_path / "two", "2023")
    with pytest.raises(
        InputError, match=r"more than one dump: All_Beauty \(2023\).*; Beauty \(2014\): reviews_Beauty_5"
    ):
        amazon.open_folder(tmp_path / "two")
    amazon_folder(tmp_path / "both", "2018")
    amazon_folder(tmp_path / "both", "2018", core="")
    with pytest.raises(InputError, match=r"holds All_Beauty\.json, All_Beauty_5\.json\. Leave only one"):
        amazon.open_folder(tmp_path / "both")
    amazon_folder(tmp_path / "twice", "2018")
    put(tmp_path / "twice", "meta_All_Beauty.json.gz", "")
    with pytest.raises(InputError, match=r"holds meta_All_Beauty\.json, meta_All_Beauty\.json\.gz\. Leave only one"):
        amazon.open_folder(tmp_path / "twice")
    put(tmp_path / "no_items", "reviews_Beauty_5.json.gz", "")
    with pytest.raises(InputError, match=r"no items for reviews_Beauty_5\.json\.gz\. Expected one of: meta_Beauty"):
        amazon.open_folder(tmp_path / "no_items")
    with pytest.raises(InputError, match=r"no reviews of Amazon\. Expected reviews_X_5\.json \(2014\).* Found: meta_X"):
        amazon.open_folder(put(tmp_path / "no_reviews", "meta_X.json", ""))
    with pytest.raises(InputError, match="is not a folder"):
        amazon.open_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("year", "change", "reason"),
    [
        ("2014", {"overall": 0}, "overall must be from 1 to 5, not 0"),
        ("2014", {"overall": None}, "overall is not a number: None"),
        ("2018", {"unixReviewTime": 1391040000000}, "unixReviewTime must be a Unix time from 1990 to 2100"),
        ("2018", {"unixReviewTime": 631151999}, "unixReviewTime must be a Unix time from 1990 to 2100"),
        ("2018", {"reviewerID": ""}, "reviewerID is empty"),
        ("2023", {"timestamp": 1588687728}, "timestamp must be a Unix time from 1990 to 2100, not 1588687728"),
        ("2023", {"parent_asin": None}, "parent_asin must be text"),
        ("2023", {"rating": 5.5}, "rating must be from 1 to 5, not 5.5"),
    ],
)
def test_bad_reviews_of_amazon(tmp_path, year, change, reason):
    folder = amazon_folder(tmp_path, year)
    (path,) = [table.path for table in amazon.open_folder(folder).interactions]
    row = {**json.loads(path.read_text()), **change}
    put(folder, path.name, path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(InputError) as caught:
        read(folder, open_folder=amazon.open_folder)
    assert f"{path}, line 2: {reason}" in str(caught.value)
    interactions, _, (rejected,) = read(folder, "skip", open_folder=amazon.open_folder)
    assert (len(interactions), json.loads(rejected["row"])) == (1, row)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'asin': 'x', 'title': __import__('os').getcwd()}", "not a Python literal: malformed node"),
        ("{'asin': 'x', 'title': 't'", "not a Python literal"),
        ("{'asin': 'x', 'title': " + "[" * 5000, "not a Python literal: "),
        ("{'asin': 'x', 'price': " + "-" * 300_000 + "1}", "not a Python literal"),
        ("{'asin': 'x', 'price': " + "1+" * 100_000 + "1}", "not a Python literal: maximum recursion depth"),
        ("{'asin': 'x', 'title': '" + "t" * 600_000 + "'}", "is a Python literal of more than 512 KiB"),
        ("{'asin': 'x', 'title': '" + "t" * 3_000_000 + "'}", "is a line of more than 2 MiB"),
        ("{'asin', 'x'}", "not a dictionary of named fields but {"),
        ("{'asin': 'x', 'title': '\\ud800'}", "holds half of a surrogate pair"),
        ("{'asin': 'x', 'title': b'\\xff'}", "not a Python literal: Object of type bytes"),
        ("{'asin': 'x', 'title': 'a\\x00b', 'price': nan}", "not a Python literal: malformed node"),
        ("{'asin': 'x', 'price': 1e999}", "price is not a finite number"),
        ("{'asin': 'x', 'title': 5}", "title must be text, not 5"),
        ("{'asin': 'x', 'categories': 5}", "categories must be a list of texts, not 5"),
        ("{'asin': 'x', 'categories': [[5]]}", "each of categories must be text, not 5"),
        (
            "{'asin': 'x', 'price': 0x" + "f" * 50_000 + "}",
            "fits 32 bits: a number of thousands of digits",
        ),
        (
            "{'asin': 0x" + "f" * 50_000 + "}",
            "of 64 bits, not a number of thousands of digits",
        ),
        ("{'asin': 'x', 5: 1}", "not a dictionary of named fields but {"),
        ("{'title': 'x'}", "no field 'asin' (found: title)"),
        ("x", "not JSON"),
    ],
)
def test_bad_literals(tmp_path, line, reason):
    folder = amazon_folder(tmp_path, "2014")
    put(folder, "meta_Beauty.json", line + "\n" + (folder / "meta_Beauty.json").read_text())
    with pytest.raises(InputError, match="line 1: ") as caught:
        read(folder, open_folder=amazon.open_folder)
    assert reason in str(caught.value)
    _, items, (rejected,) = read(folder, "skip", open_folder=amazon.open_folder)
    assert [item.text for item in items] == [TEXT_2014]
    assert len(rejected["row"]) <= 10_000


def test_literals_are_what_python_reads():
    rows = [
        {"asin": "x", "price": 1.5, "categories": [["a", "b"]], "n": -3},
        {"asin": "x", "title": "it's", "x": None, "y": True},
        {"asin": "x", "title": 'the "best"', "z": "both ' and \""},
        {"asin": "x", "title": "tab\t\\ \u00e9 \U0001f600 \x85", "a": {"b": ()}},
    ]
    for row in rows:
        assert amazon_metadata.object_or_literal(repr(row).encode() + b"\n") == row
    assert amazon_metadata.object_or_literal(b"{'a': 'x' 'y', 'b': 0x10}") == {"a": "xy", "b": 16}
    with pytest.raises(RowError, match="NUL"):
        amazon_metadata.object_or_literal(b"{'a': '\0'}")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("$12.99", 12.99),
        ("$1,012.50", 1012.5),
        ("$3.50 - $10.00", 3.5),
        ("from 5.99", 5.99),
        ("12", 12),
        (7, 7),
        (None, None),
        ("", None),
        ("\u2014", None),
        ("see 3 options", None),
        ("$12.99.1", None),
        (".a-box-inner{background-color:#fff}#alohaBuyBoxWidget", None),
        ("$" + "1" * 200, None),
        ("$" + "1" * 60, None),
        ("\uff11\uff12.\uff19\uff19", None),
        ("\u00a0$12.99\u00a0", 12.99),
    ],
)
def test_prices_of_amazon(raw, expected):
    assert amazon_metadata.item({"asin": "x", "price": raw}).text.price == expected
    assert amazon_metadata.item_2023({"parent_asin": "x", "price": raw}).text.price == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Tom &amp; Jerry &lt;3", "Tom & Jerry <3"),
        ("<b>Bold</b> <i>move</i>", "Bold move"),
        ("I <3 you if a < b and c > d", "I <3 you if a < b and c > d"),
        ("<script>var a = 1;</script> Shoes", ""),
        ("var aPageStart = (new Date()).getTime();", ""),
        (".style { color: red }", ""),
        ("Set {of 3} cups", "Set {of 3} cups"),
    ],
)
def test_page_source_is_no_text(raw, expected):
    text = amazon_metadata.item({"asin": "x", "title": raw, "brand": raw, "category": [raw, "Toys"]}).text
    assert (text.title, text.brand) == (expected, expected)
    assert text.categories == ((expected, "Toys") if expected else ("Toys",))


@pytest.mark.parametrize("raw", [".a" * 200_000 + "<", "<a " * 100_000, "{" * 400_000, "#" + "-" * 400_000 + "<"])
def test_long_texts_take_no_time(raw):
    start = time.process_time()
    amazon_metadata.item({"asin": "x", "title": raw})
    assert time.process_time() - start < 2


def test_titles_of_any_length_stay():
    title = "very " * 20_000 + "long"
    assert amazon_metadata.item({"asin": "x", "title": title}).text.title == title


# MovieLens.


def test_movielens_1m(tmp_path):
    put(tmp_path, "ratings.dat", source_files.RATINGS_DAT)
    put(tmp_path, "movies.dat", source_files.MOVIES_DAT.encode("latin-1"))
    for files in ([], ["users.dat"]):
        for name in files:
            put(tmp_path, name, "")
        interactions, items, _ = read(tmp_path, open_folder=movielens.open_folder)
        assert interactions == [Interaction("1", "1193", 978300760, 5.0), Interaction("1", "661", 978302109, 3.0)]
        assert items[1] == Item("661", ItemText("L\u00e9on (1994)", ("Action", "Children's", "Drama")))
    put(tmp_path, "ratings.dat", source_files.RATINGS_DAT + "1::661::0.5::978302109\n")
    with pytest.raises(InputError, match=r"ratings\.dat, line 3: rating must be from 1 to 5, not 0\.5"):
        read(tmp_path, open_folder=movielens.open_folder)


def test_movielens_10m(tmp_path):
    put(tmp_path, "ratings.dat", source_files.RATINGS_DAT + "1::661::0.5::978302109\n1::661::0::978302109\n")
    put(tmp_path, "movies.dat", source_files.MOVIES_DAT)
    put(tmp_path, "tags.dat", "")
    interactions, items, (rejected,) = read(tmp_path, "skip", open_folder=movielens.open_folder)
    assert [row.rating for row in interactions] == [5, 3, 0.5]
    assert rejected["reason"] == "rating must be from 0.5 to 5, not 0"
    assert items[1].text.title == "L\u00e9on (1994)"
    put(tmp_path, "movies.dat", source_files.MOVIES_DAT.encode("latin-1"))
    _, _, rejected = read(tmp_path, "skip", open_folder=movielens.open_folder)
    assert rejected[1]["reason"].startswith("not UTF-8: byte 0xe9")


def test_movielens_csv(tmp_path):
    put(tmp_path, "ratings.csv", source_files.RATINGS_CSV)
    put(tmp_path, "movies.csv", source_files.MOVIES_CSV)
    interactions, items, _ = read(tmp_path, open_folder=movielens.open_folder)
    assert interactions == [Interaction("1", "296", 1147880044, 5.0), Interaction("1", "306", 1147868817, 0.5)]
    assert items == [
        Item("296", ItemText("American President, The (1995)", ("Comedy", "Drama"))),
        Item("306", ItemText("L\u00e9on")),
    ]
    put(tmp_path, "ratings.csv", source_files.RATINGS_CSV + "1,2,5.5,1147868817\n1,2,5,12\n")
    _, _, rejected = read(tmp_path, "skip", open_folder=movielens.open_folder)
    assert [entry["reason"][:26] for entry in rejected] == ["rating must be from 0.5 to", "timestamp must be a Unix t"]


def test_movielens_says_what_it_misses(tmp_path):
    with pytest.raises(InputError, match=r"no MovieLens\. Expected one of: u\.data, ratings\.dat.* Found: nothing"):
        movielens.open_folder(tmp_path)
    put(tmp_path, "ratings.dat", "")
    with pytest.raises(InputError, match=r"no whole MovieLens\. Expected movies\.dat\. Found: ratings\.dat"):
        movielens.open_folder(tmp_path)
    put(tmp_path, "u.data", "")
    with pytest.raises(InputError, match=r"more than one MovieLens: u\.data, ratings\.dat"):
        movielens.open_folder(tmp_path)


# Yelp.


@pytest.mark.parametrize("end", ["", ".gz"])
def test_yelp(tmp_path, end):
    put(tmp_path, f"yelp_academic_dataset_review.json{end}", source_files.lines(source_files.YELP_REVIEW))
    with pytest.raises(InputError, match="no businesses of Yelp"):
        yelp.open_folder(tmp_path)
    put(tmp_path, f"yelp_academic_dataset_business.json{end}", source_files.lines(source_files.YELP_BUSINESS))
    interactions, items, _ = read(tmp_path, open_folder=yelp.open_folder)
    # `date -u -d "2018-07-07 22:09:11" +%s`
    assert interactions == [Interaction("mh_-eMZ6K5RLWhZyISBhwA", "XQfwVwDr-v0ZS3_CbbE5Xw", 1531001351, 3.0)]
    categories = ("Restaurants", "Breakfast & Brunch", "Food")
    extra = {"city": "North Wales", "state": "PA"}
    assert [item.text for item in items] == [ItemText("Turning Point of North Wales", categories, extra=extra)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"date": "2018-07-07"}, "date must be like 2018-07-07 22:09:11, not '2018-07-07'"),
        ({"date": "2018-02-30 00:00:00"}, "date must be like"),
        ({"date": "1912-02-03 00:00:00"}, "date must be a Unix time from 1990 to 2100"),
        ({"date": None}, "date must be like"),
        ({"stars": 6}, "stars must be from 1 to 5, not 6"),
    ],
)
def test_bad_reviews_of_yelp(tmp_path, change, reason):
    rows = [source_files.YELP_REVIEW, {**source_files.YELP_REVIEW, **change}]
    put(tmp_path, "yelp_academic_dataset_review.json", source_files.lines(*rows))
    put(tmp_path, "yelp_academic_dataset_business.json", source_files.lines(source_files.YELP_BUSINESS))
    with pytest.raises(InputError, match="line 2: ") as caught:
        read(tmp_path, open_folder=yelp.open_folder)
    assert reason in str(caught.value)


# What the docs show works.


def test_the_worked_examples_of_the_docs(tmp_path, monkeypatch):
    guide = (pathlib.Path(__file__).parents[1] / "docs" / "add_a_corpus.md").read_text(encoding="utf-8")
    shown = r"\$ cat shop/interactions\.csv\n(.*?)\$ cat shop/items\.jsonl\n(.*?)\$ recalign (.*?)```"
    shell = re.search(shown, guide, re.DOTALL)
    put(tmp_path / "shop", "interactions.csv", shell[1])
    put(tmp_path / "shop", "items.jsonl", shell[2])
    flags = shlex.split(shell[3].replace("\\\n", " "))
    assert flags[:7] == ["prepare", "--source", "tables", "--input", "shop", "--corpus", "shop"]
    shop = prepared("tables", tmp_path / "shop", tmp_path / "data", "shop", *flags[7:])
    texts = {shop.item_source_id(item): shop.item_text(item) for item in range(2)}
    assert texts["X-1"] == ItemText("Garden hose & reel", ("Garden", "Watering"), "Acme", None, {"colour": "green"})
    assert sorted(shop.ratings.tolist()) == [2, 4, 5]

    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    module = types.ModuleType("hotels")
    monkeypatch.setitem(sys.modules, "hotels", module)  # where pickle looks for its functions
    exec(compile(code, "hotels.py", "exec"), module.__dict__)
    put(tmp_path / "hotels", "bookings.csv.gz", "guest,hotel,day,stars\nann,h,19000,4\nbob,h,19001,7\n")
    put(tmp_path / "hotels", "hotels.jsonl", '{"id": "h", "name": "Sea View", "tags": ["beach"]}\n')
    interactions, items, (rejected,) = read(tmp_path / "hotels", "skip", open_folder=module.open_folder)
    assert interactions == [Interaction("ann", "h", 19000, 4.0)]
    assert items == [Item("h", ItemText("Sea View", ("beach",)))]
    assert rejected["reason"] == "stars must be from 1 to 5, not 7"


@pytest.mark.parametrize("source", ["amazon", "yelp", "movielens"])
def test_prepare_reads_the_dumps(tmp_path, source):
    raw = tmp_path / "raw"
    if source == "amazon":
        amazon_folder(raw, "2014", ".gz")
    elif source == "yelp":
        put(raw, "yelp_academic_dataset_review.json", source_files.lines(source_files.YELP_REVIEW))
        put(raw, "yelp_academic_dataset_business.json", source_files.lines(source_files.YELP_BUSINESS))
    else:
        put(raw, "ratings.csv", source_files.RATINGS_CSV)
        put(raw, "movies.csv", source_files.MOVIES_CSV)
    corpus = prepared(source, raw, tmp_path / "data", "c")
    assert corpus.metadata["options"]["source"] == source
    assert len(corpus.metadata["source_files"]) == 2
    assert corpus.item_text(0).title
