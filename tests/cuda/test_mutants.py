"""The table of mistakes for `make test-mutations`, which takes too long for every run, fits the
kernels' sources.
"""

import emulated
from kernel_mutants import MUTANTS, SOURCES


def test_every_mutant_changes_its_file():
    for mutant in MUTANTS:
        assert mutant.text() != (SOURCES / mutant.file).read_text(), mutant
        assert (SOURCES / f"{mutant.kernel}.cu").exists(), mutant


def test_every_operator_has_mutants():
    assert set(emulated.operators()) <= {mutant.kernel for mutant in MUTANTS}
    assert len(MUTANTS) >= 30 and len(set(MUTANTS)) == len(MUTANTS)
