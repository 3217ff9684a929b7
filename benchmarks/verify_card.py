"""Record on which graphics card the CUDA kernels passed their tests, for `gafext doctor`.

    python benchmarks/verify_card.py --passed tests memcheck --failed hopper --json FILE

benchmarks/gpu_checklist.sh runs it with the names of its steps. If the tests passed, the record also replaces an older
one of the card in gafext/doctor/verified_cards.json, to be committed.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import torch

from gafext.versions import versions

TABLE = Path(__file__).resolve().parents[1] / "gafext" / "doctor" / "verified_cards.json"


def record(passed: list[str], failed: list[str]) -> dict:
    gpu = torch.cuda.get_device_properties(0)
    return {
        "card": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": versions() | {"cuda": torch.version.cuda},
        "passed": passed,
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passed", nargs="*", default=[], metavar="STEP")
    parser.add_argument("--failed", nargs="*", default=[], metavar="STEP")
    parser.add_argument("--json", required=True, metavar="FILE", help="file for this record alone")
    parser.add_argument("--table", default=TABLE, type=Path, metavar="FILE", help="table to add it to")
    args = parser.parse_args()
    new = record(args.passed, args.failed)
    Path(args.json).write_text(json.dumps(new, indent=2) + "\n")
    if "tests" in args.passed:
        others = [old for old in json.loads(args.table.read_text()) if old["card"] != new["card"]]
        args.table.write_text(json.dumps([*others, new], indent=2) + "\n")
    print(f"{new['card']}: {'verified' if 'tests' in args.passed else 'not verified'}")


if __name__ == "__main__":
    main()
