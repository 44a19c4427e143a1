"""Random Inception weights, made once for all tests that read them."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """A file of torch-fidelity's layout, named by its hash."""
    pytest.importorskip("torch_fidelity")
    from .random_inception import random_extractor, write_weights

    return write_weights(random_extractor(), tmp_path_factory.mktemp("inception"))
