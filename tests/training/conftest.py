import pytest
from training_runs import write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data of three heads and an assembled parent, for the tests of one file."""
    return write_files(tmp_path_factory.mktemp("train"))
