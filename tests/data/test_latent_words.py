"""`mlsys.data.latent_words`: the decomposition is that of the matrix, and words of like documents are near."""

import numpy as np
import pytest

from mlsys.data import latent_words

TEXTS = [
    ["cat", "purr", "milk"], ["cat", "milk", "fur"], ["purr", "fur", "cat", "cat"], ["milk", "purr", "fur"],
    ["bus", "road", "wheel"], ["bus", "wheel", "horn"], ["road", "horn", "bus"], ["wheel", "road", "horn"], ["alone"],
]  # fmt: skip


def test_words_of_like_documents_are_near():
    latent = latent_words.fit(TEXTS, 4)
    cat, purr, bus = latent.tokens(["cat", "purr", "bus"])
    assert cat @ purr > 0.5 > abs(cat @ bus) + 0.2
    assert "alone" not in latent.vocabulary


def test_shapes_and_lengths():
    latent = latent_words.fit(TEXTS, 4)
    tokens = latent.tokens(["cat", "unknown", "cat", "bus"])
    assert tokens.shape == (3, 4)
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=1), 1, rtol=1e-5)
    weighted = latent.tokens(["cat", "bus"], weighted=True)
    np.testing.assert_allclose(np.linalg.norm(weighted, axis=1), np.log([9 / 3, 9 / 3]), rtol=1e-5)
    documents = latent.documents([*TEXTS, []])
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1), [*[1] * 8, 0, 0], atol=1e-5)
    assert {a.dtype for a in (tokens, weighted, documents)} == {np.dtype(np.float32)}
    assert latent.tokens([]).shape == (0, 4)


def test_all_dimensions_keep_all_products():
    """Untruncated but for one, V Vᵀ hardly changes the documents: their products are those of TF-IDF."""
    latent = latent_words.fit(TEXTS, 99)
    assert len(latent.scale) == len(latent.vocabulary) - 1
    near = latent.documents(TEXTS[:8]) @ latent.documents(TEXTS[:8]).T
    assert near[:4, :4].min() > 0.2
    assert np.abs(near[:4, 4:]).max() < 0.2


def test_the_same_every_time():
    rng = np.random.default_rng(0)
    texts = [[f"w{i}" for i in rng.zipf(1.5, 20) if i < 50] for _ in range(60)]
    one, other = latent_words.fit(texts, 6), latent_words.fit(texts, 6)
    np.testing.assert_array_equal(one.axes, other.axes)


def test_too_little():
    with pytest.raises(ValueError, match="at least two that share at least two words, got 1"):
        latent_words.fit([["a", "b"]])
