"""What the docs say is proven is what the contracts cover today."""

from pathlib import Path

import pytest

from evaluation.contracts.distributed import CONTRACTS, concerns
from evaluation.contracts.docs import MEANINGS, contracts, page
from evaluation.contracts.local import PROOFS, applies
from evaluation.contracts.probe import mechanisms, probe
from evaluation.contracts.report import declared, load

DOCS = Path(__file__).parents[2] / "docs"
PROVEN = load(DOCS / "contracts.json")


def test_every_contract_is_explained():
    assert set(MEANINGS) == set(contracts())


def test_the_page_is_generated():
    text = (DOCS / "zoo.md").read_text(encoding="utf8")
    assert text == page(PROVEN), "docs/zoo.md is out of date: run `make zoo`"


@pytest.mark.parametrize("entry", mechanisms(), ids=lambda e: f"{e.slot}:{e.name}")
def test_every_mechanism_is_in_it(entry):
    held = PROVEN.get(f"{entry.slot}:{entry.name}")
    assert held is not None, "run `make zoo`: this mechanism is not in docs/contracts.json"
    expected = {c for c in PROOFS if declared(entry, c) or applies(c, probe(entry))}
    small = [name for name, contract in CONTRACTS.items() if contract.world <= 2]
    expected |= {name for name in small if concerns(name, probe(entry))} | {"reshard"}
    assert set(held) == expected
    assert not [c for c, status in held.items() if status.startswith("failed")]
