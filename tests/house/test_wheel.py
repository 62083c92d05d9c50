"""What users install: everything in the package's folder, its data too, and nothing else."""

from pathlib import PurePosixPath

from codebase import ROOT, report
from hatchling.builders.wheel import WheelBuilder


def test_the_wheel_carries_the_whole_package_and_nothing_else():
    packed = {PurePosixPath(file.distribution_path) for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    files = (file for file in (ROOT / "fewstep").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    wanted = {PurePosixPath(file.relative_to(ROOT).as_posix()) for file in files}
    missing, extra = wanted - packed, packed - wanted
    assert not missing | extra, report([*(f"{file}: missing" for file in missing), *(f"{file}: extra" for file in extra)])
    assert {"py.typed", "skinny.c", "code-nano.toml"} <= {file.name for file in packed}
