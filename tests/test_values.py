"""Forward results of every sample, dtype and format against float64."""

import pytest
import torch

from support import assert_within_rule, each_dtype, each_format, each_sample, results


@each_sample
@each_dtype
@each_format
def test_values(case, sample, dtype, memory_format):
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} is not defined for {dtype}")
    tensors = case.tensors(sample, dtype, memory_format)
    assert_within_rule(case, sample, tensors, dtype, results)
    if case.exact:
        own = results(case, case.own, sample, tensors)
        native = results(case, case.native, sample, tensors)
        torch.testing.assert_close(own, native, rtol=0, atol=0, equal_nan=True)
