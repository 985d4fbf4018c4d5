"""Our vocabulary against FLAN-T5's `tokenizer.json` on every title of the Amazon sets.

They are the same unigram model and the same normalizer, but two implementations of its search: SentencePiece's (ours,
SeqIO's and T5X's) and that of `tokenizers` (transformers'). Where two segmentations of a word have the same score,
each keeps another one. In 23,959 titles that happens to one word, `+++` (`SPF50+ PA+++`): SentencePiece cuts it
`++ +`, `tokenizers` cuts it `+ ++`. Text and score of both are the same, so a model trained with one reads the other.
"""

import gzip
import json

import pytest
import sentencepiece

from seqio_tasks import vocabulary
from tests.shared_data import shared

tokenizers = pytest.importorskip("tokenizers")


@pytest.mark.parametrize(("name", "titled", "ties"), [("amazon_beauty", 12_094, 10), ("amazon_toys", 11_865, 0)])
def test_every_title_but_for_ties(t5_words, name, titled, ties):
    theirs = tokenizers.Tokenizer.from_file(str(shared("data/t5_vocabulary/tokenizer.json")))
    pieces = sentencepiece.SentencePieceProcessor(model_file=t5_words.path)
    with gzip.open(shared(f"data/{name}/items.jsonl.gz"), "rt", encoding="utf-8") as lines:
        titles = [title for line in lines if (title := json.loads(line).get("title"))]
    assert len(titles) == titled

    different = []
    for title, ours, encoded in zip(titles, t5_words.encode(titles), theirs.encode_batch(titles), strict=True):
        *their_ids, end = encoded.ids
        assert end == vocabulary.EOS_ID
        if ours == their_ids:
            continue
        different.append(title)
        text, score = (
            {way: join(map(of_piece, ids)) for way, ids in (("ours", ours), ("theirs", their_ids))}
            for join, of_piece in (("".join, pieces.id_to_piece), (sum, pieces.get_score))
        )
        assert text["ours"] == text["theirs"]
        assert score["ours"] == pytest.approx(score["theirs"], rel=1e-6)  # a tie; scores are float32
        assert ours.count(plus := pieces.piece_to_id("+")) == their_ids.count(plus) > 0
        assert "+++" in title
    assert len(different) == ties
