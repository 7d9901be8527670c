"""Nearest neighbours by faiss and by torch: the same, those of scikit-learn, whatever the ties."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from test_evaluate import blobs, given

from unlabeled.evaluate import knn
from unlabeled.evaluate.knn import KNN, search

WAYS = pytest.mark.parametrize("by", ["torch", "faiss"])


def expected(queries, bank, k, *, skip_self=False):
    """Positions (n, k) by sorting all similarities, as float32, with equal ones by position."""
    a, b = (F.normalize(x.double(), dim=1) for x in (queries, bank))
    s = (a[:, None] * b[None]).sum(2).float()
    if skip_self:
        s.fill_diagonal_(-2)
    return torch.from_numpy(np.argsort(-s.numpy(), axis=1, kind="stable")[:, :k])


@WAYS
@pytest.mark.parametrize(("k", "t"), [(1, 0.07), (20, 0.07), (200, 1.0)])
def test_votes_are_those_of_scikit_learn(by, k, t):
    (x, y), (test_x, test_y) = blobs(400, 7, 10, 1.2), blobs(150, 7, 10, 1.2, seed=1)
    reference = KNeighborsClassifier(
        k, metric="cosine", weights=lambda d: np.exp((1 - d) / t), algorithm="brute"
    ).fit(x.numpy(), y.numpy())
    wrong = reference.predict(test_x.numpy()) != test_y.numpy()
    result = KNN(k=[k], temperature=[t], search=by)(given(x, y, test_x, test_y, 7))
    assert np.array_equal(result.per_image[f"k{k}_t{t:g}/top1"] == 0, wrong)
    near = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(x.numpy())
    distance, place = near.kneighbors(test_x.numpy())
    similarity, found = search(test_x, x, k, by=by)
    np.testing.assert_allclose(similarity, 1 - distance, atol=2e-6)
    assert np.array_equal(found, place)


@WAYS
@pytest.mark.parametrize("dim", [3, 500])
@pytest.mark.parametrize("different", [1, 5, 300])
def test_equal_images_come_in_their_order(by, dim, different):
    # At 500 dimensions products of equal rows differ in the last bit, by their place in a block.
    g = torch.Generator().manual_seed(dim)
    bank = torch.randn(different, dim, generator=g)
    bank = bank[torch.randint(different, (900,), generator=g)]
    queries = torch.cat([torch.randn(20, dim, generator=g), bank[:20]])
    similarity, found = search(queries, bank, 30, by=by)
    assert torch.equal(found, expected(queries, bank, 30))
    assert (similarity.diff(dim=1) <= 0).all()


@WAYS
def test_neighbours_that_hardly_differ_are_told_apart(by):
    g = torch.Generator().manual_seed(0)
    bank = 1 + 1e-3 * torch.randn(700, 64, generator=g)  # all similarities above 0.999998
    assert (F.normalize(bank) @ F.normalize(bank).T).min() > 0.99999
    assert torch.equal(search(bank[:50], bank, 10, by=by)[1], expected(bank[:50], bank, 10))


@WAYS
def test_the_query_is_left_out_among_its_duplicates(by):
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    _, found = search(x, x, 6, skip_self=True, by=by)
    assert torch.equal(found, expected(x, x, 6, skip_self=True))
    assert not (found == torch.arange(300)[:, None]).any()
    x, y = torch.ones(100, 4), torch.arange(100) % 3  # collapsed: all similarities are 1
    _, found = search(x, x, 2, skip_self=True, by=by)
    assert found[:3].tolist() == [[1, 2], [0, 2], [0, 1]]
    assert found[3:].unique().tolist() == [0, 1]
    scores = KNN(k=[1], leave_one_out=True, search=by)(given(x, y, x, y, 3)).scores
    assert scores["k1_t0.07/top1"] == pytest.approx(33 / 100)  # the first image's class, but its


@WAYS
@pytest.mark.parametrize("skip_self", [False, True])
def test_chunks_change_nothing(by, skip_self, monkeypatch):
    x, _ = blobs(230, 5, 6, 2)
    x[100:130] = x[7]
    whole = search(x, x, 9, skip_self=skip_self, by=by)
    monkeypatch.setattr(knn, "QUERIES", 64)
    monkeypatch.setattr(knn, "NUMBERS", 6 * 11)
    parts = search(x, x, 9, skip_self=skip_self, by=by)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])


@WAYS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_types_are_searched(by, dtype):
    x, _ = blobs(200, 5, 6, 2)
    x = x.to(dtype)
    _, found = search(x[:40], x, 5, by=by)
    assert torch.equal(found, expected(x[:40].float(), x.float(), 5))


@WAYS
def test_no_queries_and_small_banks(by):
    x = torch.eye(3)
    assert search(x[:0], x, 2, by=by)[1].shape == (0, 2)
    assert search(x[:1], x, 3, by=by)[1].tolist() == [[0, 1, 2]]
    assert search(x[:1], x[:1], 1, by=by)[1].tolist() == [[0]]


def test_who_searches_is_checked():
    with pytest.raises(ValueError, match="search must be auto, torch or faiss, got 'annoy'"):
        KNN(search="annoy")
