"""The flat C functions in a context on the software Metal device: those tests of them once more that compute."""

from __future__ import annotations

import pytest

import native
import test_flat
import umfa

if not umfa.info()["devices"]["softmetal"]:
    pytest.skip("libsoftmetal is not built", allow_module_level=True)

COMPUTING = (
    "test_flat__each_mix_of_types__equals_the_reference_forward_and_backward",
    "test_flat__transposed_operands__equal_the_reference_forward_and_backward",
    "test_flat__head_sizes__equal_the_reference",
    "test_flat__beside_the_descriptors__gives_the_same_bits",
    "test_flat__without_logsumexp__gives_the_same_output_and_no_record",
    "test_flat_backward__twice__gives_the_same_bits",
    "test_flat_backward__the_output_destroyed__is_not_needed",
    "test_flat_backward__key_and_value__read_the_d_values_that_are_passed",
    "test_flat__no_sequence_or_no_query__writes_zeros_to_gradients_without_a_record",
    "test_flat__no_key__gives_zeros_and_minus_infinity",
    "test_flat__inputs_that_share_memory__are_legal",
    "test_flat__addresses_inside_a_buffer__are_host_memory",
)
for name in COMPUTING:
    globals()[name] = vars(test_flat)[name]


@pytest.fixture
def context():
    with native.Context(2, native.lib.MFA_DEVICE_SOFTMETAL) as handle:
        yield handle
