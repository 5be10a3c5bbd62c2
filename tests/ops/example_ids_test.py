import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops import example_ids

IDS = np.array([-1, 0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 5 * 2**32 + 7, 2**62])


def test_words_are_the_numbers_again():
    words = example_ids.words(IDS)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(example_ids.whole(words), IDS)
    np.testing.assert_array_equal(example_ids.whole(jnp.asarray(words)), IDS)
    narrow = IDS[:4].astype(np.int32)
    np.testing.assert_array_equal(example_ids.whole(narrow), narrow)


@pytest.mark.parametrize("wide", [False, True])
def test_the_same_example_is_known_by_all_its_bits(wide):
    ids = np.array([3, 2**32 + 3, 3, 3 * 2**32]) if wide else np.array([3, 4, 3, 5], np.int32)
    found = example_ids.same(jnp.asarray(example_ids.words(ids) if wide else ids))
    np.testing.assert_array_equal(found, ids[:, None] == ids[None])
