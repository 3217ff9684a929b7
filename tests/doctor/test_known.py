"""Which installed versions are known to be broken."""

import pytest

from gafext.doctor.known import KNOWN, known_problems


@pytest.mark.parametrize(
    "package, version, breaks",
    [
        ("torch", "2.10.1+cu128", [True]),
        ("torch", "1.13", [True]),
        ("torch", "2.11.0+cu130", [False]),
        ("torch", "2.12.0", []),
        ("torch", "2.13.0.dev20260101", [False]),
        ("torch", "2.14.1", [False]),
        ("torch", "2.15.0", [False]),
        ("torch", "2.16", []),
        ("torch", "not installed", []),
        ("Pillow", "12.3.0", []),
        ("Pillow", "13.0.0", [False]),
        ("numpy", "2.4.6", []),
    ],
)
def test_versions(package, version, breaks):
    problems = known_problems({package: version})
    assert [broken for broken, _ in problems] == breaks
    assert all(words.startswith(f"{package} {version}: ") for _, words in problems)


def test_every_entry_names_a_range_and_a_reason():
    assert all(known.reason and (known.before is None or known.first < known.before) for known in KNOWN)
