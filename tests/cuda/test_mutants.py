"""The table of mistakes for `make test-mutations`, which takes too long for every run, fits the
kernels' sources.
"""

from kernel_mutants import MUTANTS, SOURCES


def test_mutants_fit_the_sources():
    for mutant in MUTANTS:
        assert mutant.text() != (SOURCES / mutant.file).read_text(), mutant
        assert (SOURCES / f"{mutant.kernel}.cu").exists(), mutant
    assert len(MUTANTS) >= 30 and len(set(MUTANTS)) == len(MUTANTS)
