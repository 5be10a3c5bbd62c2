"""The checksum sees every bit, every swap and every shape, whatever the dtype."""

import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.storage.checksum import Damaged, checksum, describe, seal, unseal, verify


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint32, jnp.bool_, jnp.int8])
def test_checksum_sees_every_single_bit_and_every_swap(dtype):
    array = np.asarray([0, 0, 1, 1, 0, 1], dtype)
    before = checksum(array)
    for index in range(array.size):
        for bit in range(1 if dtype == jnp.bool_ else 8 * array.itemsize):
            other = array.copy()
            other.view(f"u{array.itemsize}")[index] ^= 1 << bit
            after = checksum(other)
            assert all(new != old for new, old in zip(after, before, strict=True))
    assert checksum(array[[2, 1, 0, 3, 4, 5]])[0] != before[0]
    assert checksum(array.reshape(2, 3))[0].shape == ()


def test_checksum_is_the_formula_written_out_in_numpy():
    def mix(bits, first, second):
        for shift, factor in ((16, first), (15, second)):
            bits = (bits ^ (bits >> shift)) * factor % 2**32
        return bits ^ (bits >> 16)

    words = [0, 0]
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    for index, bits in enumerate(array.view(np.uint32).ravel().tolist()):
        key = mix((index + 0x9E3779B9) % 2**32, 0x7FEB352D, 0x846CA68B)
        words[0] += mix(bits ^ key, 0x7FEB352D, 0x846CA68B)
        words[1] += mix((bits + key * 0x85EBCA6B) % 2**32, 0x21F0AAAD, 0xD35A2D97)
    assert [int(word) for word in checksum(array)] == [word % 2**32 for word in words]


def test_a_record_names_the_first_array_that_differs_and_how():
    arrays = {"params/a": np.zeros((2, 3), np.float32), "params/b": np.ones(4, np.int32)}
    record = unseal(seal(describe(arrays)))
    verify(record, arrays)
    with pytest.raises(Damaged, match=r"params/b: .*checksum"):
        verify(record, {**arrays, "params/b": np.zeros(4, np.int32)})
    with pytest.raises(Damaged, match=r"params/a: .*\[\[2, 3\], 'float32'\], .*\[\[3, 2\]"):
        verify(record, {**arrays, "params/a": np.zeros((3, 2), np.float32)})
    with pytest.raises(Damaged, match=r"params/a: .* read as"):
        verify(record, {"params/b": arrays["params/b"]})
    sealed = seal(record)
    sealed["arrays"]["params/a"][0] = [3, 2]
    with pytest.raises(Damaged, match="list of checksums"):
        unseal(sealed)
