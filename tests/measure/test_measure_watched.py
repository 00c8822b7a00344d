"""What an evaluation does with the network, as seen from outside."""

import numpy as np
import pytest
import torch

from paredown.measure.watched import Watch, another_range, oddities, range_of


def watched(predict, batches):  # type: ignore[no-untyped-def]
    watch = Watch(predict)
    for x in batches:
        watch(x)
    return watch


def test_the_predictor_answers_as_before_and_the_spread_is_numpys() -> None:
    rng = np.random.default_rng(0)
    batches = [torch.from_numpy(rng.normal(size=(n, 3)).astype(np.float32)) for n in (4, 1, 3)]
    watch = Watch(lambda x: {"a": x * 2, "b": (x[:, :1] + 1,)})
    answers = [watch(x) for x in batches]
    together = torch.cat(batches).double().numpy()
    assert all(torch.equal(a["a"], x * 2) for a, x in zip(answers, batches, strict=True))
    assert watch.spread == pytest.approx(max(np.ptp(2 * together, axis=0).max(), np.ptp(together[:, :1] + 1)), rel=1e-6)
    assert (watch.low, watch.high) == pytest.approx((together.min(), together.max()))
    assert watch.num_samples == 8


def test_other_inputs_or_another_order_are_seen_and_the_same_are_not() -> None:
    batches = [torch.arange(4.0).reshape(2, 2), torch.arange(4.0, 8.0).reshape(2, 2)]
    dense = watched(lambda x: x, batches)
    assert not list(oddities(dense, watched(lambda x: x * 3, batches)))
    for others in (batches[::-1], [batches[0], batches[1] + 0.5], batches[:1]):
        assert [s for s in oddities(dense, watched(lambda x: x, others)) if "other inputs" in s]


@pytest.mark.parametrize("left", [0.0, 0.001])
def test_answers_that_no_longer_depend_on_the_sample_are_flagged(left: float) -> None:
    batches = [torch.linspace(2800, 3900, 20).reshape(20, 1)]
    dense = watched(lambda x: x, batches)
    (said,) = oddities(dense, watched(lambda x: 3300 + left * x, batches))
    assert "no longer depend" in said
    assert not list(oddities(dense, watched(lambda x: 3300 + 0.3 * x, batches)))


def test_without_an_axis_of_samples_nothing_is_said_of_the_spread() -> None:
    varying = [torch.zeros(2, 3), torch.zeros(2, 4)]
    assert watched(lambda x: x, varying).spread is None
    assert watched(lambda x: x.sum(), varying[:1]).spread is None
    assert watched(lambda x: x, [torch.zeros(1, 3)]).spread is None  # one sample


def test_calibration_in_another_range_is_named() -> None:
    watch = watched(lambda x: x, [torch.rand(8, 1, 4, 4)])
    (said,) = another_range(range_of([torch.rand(8, 1, 4, 4) * 255]), watch)
    assert "normalise" in said
    assert not list(another_range(range_of([torch.rand(2, 1, 4, 4)]), watch))
    assert not list(another_range(range_of([torch.zeros(2, dtype=torch.long)]), watch))  # no floats, no range
