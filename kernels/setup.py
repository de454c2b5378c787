"""Build hooks of ssm-zoo-kernels: the native library is compiled by ``zoo_kernels/build.py``, and may be missing.

The metadata is in pyproject.toml. The library is loaded with ctypes, so a wheel fits every Python of its platform.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("zoo_kernels_build", HERE / "src" / "zoo_kernels" / "build.py")
assert spec is not None
assert spec.loader is not None
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


class BuildNative(build_ext):
    """Compile the library; where that fails, install without it and leave the reason for ``zoo_kernels.status()``."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path("zoo_kernels") / build.LIBRARY)

    def get_ext_fullpath(self, ext_name: str) -> str:
        folder = HERE / "src" if self.inplace else Path(self.build_lib)
        return str(folder / self.get_ext_filename(ext_name))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        note = HERE / "src" / "zoo_kernels" if self.inplace or self.editable_mode else target.parent
        note = note / "native_missing.txt"
        try:
            build.compile_library(target, work=Path(self.build_temp).resolve(), sources=HERE / "native")
            note.unlink(missing_ok=True)
        except build.BuildError as error:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{error}\n")
            self.warn(f"the native CPU library is left out, the slow reference will serve: {error}")


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("zoo_kernels.native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
