"""Merging partial results over disjoint keys: mfa_attention_merge() against attention over all keys, and against its formula."""

from __future__ import annotations

import numpy as np
import pytest

import native
import umfa
from cases import DTYPES, STYLES, Sizes, place, problem_with
from native import FP32, FP64, INVALID_ARGUMENT, INVALID_CONTEXT, INVALID_DIMENSIONS, NULL, SUCCESS, Context, address, lib, message
from tolerances import SMALLEST, UNIT, assert_within

SHAPE = (2, 3, 19, 9)


@pytest.fixture(scope="module")
def context():
    with Context() as handle:
        yield handle


class Parts:
    """Two partial results and room for the merged one."""

    def __init__(self, rng, dtypes=("float32",) * 3, statistics=np.float32, style="contiguous"):
        made = [rng.normal(size=SHAPE).astype(DTYPES[dtype]) for dtype in dtypes]
        self.outputs = [place(array, style, rng) for array in made[:2]]
        self.output = place(np.full_like(made[2], 7), "permuted" if style == "broadcast" else style, rng)
        self.statistics = [rng.normal(size=SHAPE[:3]).astype(statistics) * 3 for _ in range(2)]
        self.logsumexp = np.full(SHAPE[:3], 7, statistics)
        self.precision = FP64 if statistics == np.float64 else FP32

    def arguments(self):
        descriptors = [native.tensor(array) for array in (*self.outputs, self.output)]
        first, second, result = (descriptor.pointer for descriptor in descriptors)
        self.keep = descriptors
        return [first, address(self.statistics[0]), second, address(self.statistics[1]), result, address(self.logsumexp), self.precision]

    def run(self, context, **changes):
        names = ("output_a", "logsumexp_a", "output_b", "logsumexp_b", "output", "logsumexp", "statistics_precision")
        return lib.mfa_attention_merge(context, *{**dict(zip(names, self.arguments())), **changes}.values())

    def expected(self):
        """The formula in float64, and how far off the result may be."""
        first, second = (statistic.astype(np.float64) for statistic in self.statistics)
        with np.errstate(all="ignore"):
            highest = np.maximum(first, second)
            reference = np.where(np.isfinite(highest), highest, 0)
            weights = [np.exp(statistic - reference) for statistic in (first, second)]
            total = weights[0] + weights[1]
            logsumexp = np.log(total) + reference
            output = np.zeros(SHAPE)
            bound = np.zeros(SHAPE)
            for statistic, weight, part in zip((first, second), weights, self.outputs):
                share = np.where(statistic == -np.inf, 0, weight / total)[..., None]
                part = np.where((statistic == -np.inf)[..., None], 0, part.astype(np.float64))
                output += share * part
                bound += 16 * UNIT["float32"] * np.abs(share * part) * (1 + np.abs(highest)[..., None])
        dtype = str(self.output.dtype)
        return output, logsumexp, np.nan_to_num(bound + UNIT[dtype] * np.abs(output)) + SMALLEST[dtype]

    def check(self, context):
        assert self.run(context) == SUCCESS, message(context)
        output, logsumexp, bound = self.expected()
        assert_within(self.output, output, bound, "output")
        assert_within(self.logsumexp, logsumexp, 1e-6 * np.maximum(1, np.abs(np.nan_to_num(logsumexp))), "logsumexp")

    def snapshot(self):
        return [array.tobytes() for array in (*self.outputs, *self.statistics, self.output, self.logsumexp)]


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("statistics", [np.float32, np.float64])
def test_mfa_attention_merge__types_in_any_mix__equal_the_formula(first, second, result, statistics, context, rng):
    Parts(rng, (first, second, result), statistics).check(context)


@pytest.mark.parametrize("style", STYLES)
def test_mfa_attention_merge__strides__equal_the_formula(style, context, rng):
    Parts(rng, style=style).check(context)


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_mfa_attention_merge__absent_parts__are_not_read(absent, context, rng):
    parts = Parts(rng)
    for index in {0: (0,), 1: (1,), 2: (0, 1)}[absent]:
        parts.statistics[index][0, 1] = -np.inf
        parts.outputs[index][0, 1] = np.nan
    parts.check(context)
    assert np.isfinite(parts.output).all()
    if absent == 2:
        assert (parts.output[0, 1] == 0).all()
        assert (parts.logsumexp[0, 1] == -np.inf).all()
    else:
        assert (parts.output[0, 1] == parts.outputs[1 - absent][0, 1]).all()
        assert (parts.logsumexp[0, 1] == parts.statistics[1 - absent][0, 1]).all()


@pytest.mark.parametrize("size", [50.0, 1e4, 1e30, 3e38])
def test_mfa_attention_merge__statistics_far_apart_or_large__do_not_overflow(size, context, rng):
    parts = Parts(rng)
    parts.statistics[0][0] = size
    parts.statistics[1][0] = -size
    parts.statistics[0][1] = parts.statistics[1][1] = size
    parts.check(context)
    assert (parts.output[0] == parts.outputs[0][0]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["output", "logsumexp"])
def test_mfa_attention_merge__values_that_are_not_finite__stay_in_their_rows(where, value, context, rng):
    parts = Parts(rng)
    (parts.outputs if where == "output" else parts.statistics)[0][0, 1, 5] = value
    assert parts.run(context) == SUCCESS
    finite = np.isfinite(parts.output).all(axis=-1)
    assert not finite[0, 1, 5]
    assert finite.sum() == finite.size - 1


@pytest.mark.parametrize("option", ["plain", "mask_additive", "mask_bool", "softcap", "alibi"])
@pytest.mark.parametrize("split", [1, 40, 79])
def test_mfa_attention_merge__two_parts_of_the_keys__equal_all_keys(option, split, context):
    made = problem_with(option, sizes=Sizes(rows=33, columns=80))
    if option == "alibi":
        made = made.with_keywords(query_offset=0)
    results = []
    for columns in (slice(0, split), slice(split, None)):
        keywords = dict(made.keywords)
        if "mask" in keywords:
            keywords["mask"] = keywords["mask"][..., columns]
        if option == "alibi":
            keywords["query_offset"] = -columns.start if columns.start else 0
        operands = made.query.argument, made.key.argument[:, :, columns], made.value.argument[:, :, columns]
        results.append(umfa.attention(*operands, **keywords, return_lse=True))
    output, logsumexp = np.empty(made.sizes.output, np.float32), np.empty(made.sizes.statistics, np.float32)
    tensors = [native.tensor(array) for array in (results[0][0], results[1][0], output)]
    first, second, result = (tensor.pointer for tensor in tensors)
    status = lib.mfa_attention_merge(
        context, first, address(results[0][1]), second, address(results[1][1]), result, address(logsumexp), FP32
    )
    assert status == SUCCESS, message(context)
    assert_within(output, made.bounds.at.output, 3 * made.bounds.output)
    assert_within(logsumexp, made.bounds.at.logsumexp, 2 * made.bounds.logsumexp)


def test_mfa_attention_merge__any_number_of_threads__gives_the_same_bits(rng):
    parts, results = Parts(rng), []
    for count in (1, 2, 3, 7):
        with Context(count) as handle:
            assert parts.run(handle) == SUCCESS
            results.append(parts.snapshot())
    assert all(result == results[0] for result in results)


MISTAKES = {
    "output_a NULL": ({"output_a": NULL}, INVALID_ARGUMENT),
    "output_b NULL": ({"output_b": NULL}, INVALID_ARGUMENT),
    "output NULL": ({"output": NULL}, INVALID_ARGUMENT),
    "logsumexp_a NULL": ({"logsumexp_a": NULL}, INVALID_ARGUMENT),
    "logsumexp_b NULL": ({"logsumexp_b": NULL}, INVALID_ARGUMENT),
    "logsumexp NULL": ({"logsumexp": NULL}, INVALID_ARGUMENT),
    "statistics of half precision": ({"statistics_precision": 1}, INVALID_ARGUMENT),
    "statistics of codes": ({"statistics_precision": 8}, INVALID_ARGUMENT),
    "statistics unknown": ({"statistics_precision": -1}, INVALID_ARGUMENT),
}
FIELDS = {
    "struct_size 0": ("struct_size", 0, INVALID_ARGUMENT),
    "data NULL": ("data", NULL, INVALID_ARGUMENT),
    "codes": ("precision", 8, INVALID_ARGUMENT),
    "unknown precision": ("precision", 77, INVALID_ARGUMENT),
    "other rows": ("shape.2", 18, INVALID_DIMENSIONS),
    "negative size": ("shape.0", -1, INVALID_DIMENSIONS),
    "overflowing stride": ("strides.1", 2**62, INVALID_DIMENSIONS),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mfa_attention_merge__each_bad_argument__returns_its_status_and_changes_nothing(name, context, rng):
    parts = Parts(rng)
    changes, expected = MISTAKES[name]
    before = parts.snapshot()
    assert parts.run(context, **changes) == expected
    assert parts.snapshot() == before


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("which", range(3))
def test_mfa_attention_merge__each_bad_field__returns_its_status_and_changes_nothing(which, name, context, rng):
    parts = Parts(rng)
    field, value, expected = FIELDS[name]
    arguments = parts.arguments()
    structure = arguments[2 * which]
    field, _, index = field.partition(".")
    if index:
        getattr(structure, field)[int(index)] = value
    else:
        setattr(structure, field, value)
    before = parts.snapshot()
    assert lib.mfa_attention_merge(context, *arguments) == expected, message(context)
    assert parts.snapshot() == before


@pytest.mark.parametrize("other", ["output_a", "output_b", "logsumexp_a", "logsumexp_b"])
@pytest.mark.parametrize("shift", [0, 4])
def test_mfa_attention_merge__results_on_inputs__return_5(other, shift, context, rng):
    parts = Parts(rng)
    arrays = {
        "output_a": parts.outputs[0],
        "output_b": parts.outputs[1],
        "logsumexp_a": parts.statistics[0],
        "logsumexp_b": parts.statistics[1],
    }
    before = parts.snapshot()
    assert parts.run(context, logsumexp=native.ffi.cast("char *", address(arrays[other])) + shift) == INVALID_ARGUMENT
    assert parts.snapshot() == before


def test_mfa_attention_merge__invalid_context__returns_1(rng):
    parts = Parts(rng)
    before = parts.snapshot()
    assert parts.run(NULL) == INVALID_CONTEXT
    assert parts.run(NULL, output=NULL) == INVALID_CONTEXT
    assert parts.snapshot() == before
