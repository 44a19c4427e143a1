"""Statistics on disk: round trips, what is held against the network, damaged and foreign files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewstep.errors import UserError
from fewstep.evaluation.fid import Moments, frechet_distance
from fewstep.evaluation.statistics import Statistics, read_statistics, write_statistics


def _features(n=50, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _network(**changed):
    return SimpleNamespace(**{"name": "inception-clean", "sha256": "ab12", "resize": "clean", **changed})


def _statistics():
    return Statistics.of(Moments.of(_features()), _network())


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_what_is_written_is_read_bit_for_bit_and_scores_as_the_features_do(tmp_path, suffix):
    file, made = tmp_path / f"reference{suffix}", _statistics()
    write_statistics(made, file)
    read = read_statistics(file, _network())
    assert torch.equal(read.mean, made.mean)
    assert torch.equal(read.covariance, made.covariance)
    assert read.words.split()[-1] == made.words.split()[-1]
    other = Moments.of(_features(seed=1))
    assert frechet_distance(other, read) == frechet_distance(other, Moments.of(_features()))
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_the_header_says_where_they_come_from(tmp_path):
    write_statistics(_statistics(), tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", "pt") as opened:
        said = json.loads(opened.metadata()["about"])
    assert said == {"format": 1, "n": 50, "features": "inception-clean", "sha256": "ab12", "resize": "clean"}
    assert "n=50" in read_statistics(tmp_path / "s.safetensors").words


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": "inception"}, "features is 'inception-clean', that of the network 'inception'"),
        ({"resize": "legacy"}, "resize is 'clean', that of the network 'legacy'"),
        ({"sha256": "cd34"}, "sha256 is 'ab12', that of the network 'cd34'"),
    ],
)
def test_statistics_of_another_network_are_refused(tmp_path, changed, words):
    write_statistics(_statistics(), tmp_path / "s.safetensors")
    with pytest.raises(UserError, match=words):
        read_statistics(tmp_path / "s.safetensors", _network(**changed))


def test_an_npz_of_other_packages_is_read_and_its_width_is_held_against_the_features(tmp_path):
    x = _features().double().numpy()
    np.savez(tmp_path / "theirs.npz", mu=x.mean(0).astype(np.float32), sigma=np.cov(x, rowvar=False))
    read = read_statistics(tmp_path / "theirs.npz", _network())
    assert (read.n, read.features) == (None, None)
    assert frechet_distance(read, Moments.of(_features())) < 1e-6
    with pytest.raises(UserError, match="features of 6 and 5 numbers"):
        frechet_distance(read, Moments.of(_features(d=5)))


def test_statistics_of_unknown_origin_are_not_given_one(tmp_path):
    with pytest.raises(UserError, match=r"written as \.npz only"):
        write_statistics(Statistics(torch.zeros(2), torch.eye(2)), tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mu", "sigma", "words"),
    [
        (np.zeros(3), np.eye(4), r"not \[3\] and \[4, 4\]"),
        (np.zeros(2), np.array([[1, 0], [0, np.nan]]), "not finite"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (np.array([{"a": 1}]), np.eye(1), "holds no `mu` and `sigma`.*allow_pickle"),
    ],
)
def test_arrays_that_are_no_statistics_are_refused(tmp_path, mu, sigma, words):
    np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
    with pytest.raises(UserError, match=words):
        read_statistics(tmp_path / "s.npz")


def test_damaged_foreign_and_missing_files_are_named(tmp_path):
    for suffix, words in ((".npz", "holds no `mu` and `sigma`"), (".safetensors", "holds no statistics of fewstep")):
        (tmp_path / f"s{suffix}").write_bytes(b"not a file of that kind")
        with pytest.raises(UserError, match=words):
            read_statistics(tmp_path / f"s{suffix}")
    save_file({"mean": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="holds no statistics of fewstep"):
        read_statistics(tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="no statistics"):
        read_statistics(tmp_path / "none.npz")
    with pytest.raises(UserError, match=r"statistics are .safetensors or .npz"):
        read_statistics(tmp_path / "s.pkl")
