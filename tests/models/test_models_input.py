from __future__ import annotations

import pytest
import torch

from paredown.errors import UsageError
from paredown.models import parse_input


@pytest.mark.parametrize("text", ["1x3x224x224", "1,3,224,224", "1X3×224x224", " 1x3x224x224 ", "float32:1x3x224x224"])
def test_one_tensor(text):
    made = parse_input(text)
    assert made.shape == (1, 3, 224, 224)
    assert made.dtype == torch.float32
    assert torch.equal(made, parse_input(text))  # the same every time
    assert 0.95 < made.std() < 1.05


@pytest.mark.parametrize(
    ("text", "dtype"), [("int64:1x16", torch.int64), ("1x16:fp16", torch.float16), ("bool:1x16", torch.bool)]
)
def test_a_dtype_before_or_behind(text, dtype):
    assert parse_input(text).dtype == dtype


def test_integers_fit_any_embedding_and_differ():
    made = parse_input("int64:4x64")
    assert set(made.flatten().tolist()) == {0, 1}
    assert parse_input("uint8:2x2").max() <= 1


@pytest.mark.parametrize("between", [";", " ", ",", " ; "])
def test_names_are_keyword_arguments_and_masks_let_all_through(between):
    made = parse_input(between.join(["ids=int64:1x16", "attention_mask=int64:1x16"]))
    assert made["args"] == ()
    assert made["kwargs"].keys() == {"ids", "attention_mask"}
    assert bool((made["kwargs"]["attention_mask"] == 1).all())


def test_several_stand_in_order():
    made = parse_input("1x3x8x8; int64:1x4; scale=1")
    assert [t.shape for t in made["args"]] == [(1, 3, 8, 8), (1, 4)]
    assert made["kwargs"]["scale"].shape == (1,)


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "Got nothing"),
        ("banana", "Got 'banana'"),
        ("1x3x", "Got '1x3x'"),
        ("1x-3", "Got '1x-3'"),
        ("1.5x3", "1.5x3"),
        ("1x0x3", "Got 0 elements"),
        ("999999x999999x9", "elements"),
        ("flaot32:1x3", "did you mean float32"),
        ("float99999:1", "the dtype"),
        ("int64:1x3:int32", "int64:1x3:int32"),
        ("a=1x3 a=1x3", "'a' twice"),
        ("1" * 5000, "characters of sizes"),
    ],
)
def test_one_clear_rule(text, got):
    with pytest.raises(UsageError, match="an input must be sizes joined by x") as raised:
        parse_input(text)
    assert got in str(raised.value)
    assert len(str(raised.value)) < 6000
