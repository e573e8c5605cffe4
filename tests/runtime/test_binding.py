"""The import hook for llama_cpp and the loading of ggml's modules, as a wheel for other machines needs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lt_gguf.runtime.binding import NoBackend, load_backends
from lt_gguf.runtime.library import library_dir, load_llama_cpp

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lt_gguf"
PORTABLE = next((path.parent for path in ROOT.glob("build/wheel/py3-*/bin/libllama.*")), None)

# A libllama that has loaded no backend, and in which loading finds one only if the directory's name says so.
FAKE = """
#include <stddef.h>
#include <string.h>
static int loaded, silent;
size_t ggml_backend_reg_count(void) { return BUILT_IN || loaded; }
void * ggml_backend_dev_by_type(int type) { return type == 0 && (BUILT_IN || loaded) ? &loaded : NULL; }
void ggml_backend_load_all_from_path(const char * path) { loaded = silent && strstr(path, "fits") != NULL; }
void ggml_log_get(void ** callback, void ** data) { *callback = NULL; *data = NULL; }
void ggml_log_set(void * callback, void * data) { silent = callback != NULL; }
"""


def fake_library(directory: Path, built_in: int) -> Path:
    source, library = directory / "fake.c", directory / "libfake.so"
    source.write_text(FAKE)
    subprocess.run(["cc", "-shared", "-fPIC", f"-DBUILT_IN={built_in}", "-o", library, source], check=True)
    return library


def test_modules_are_loaded_where_no_backend_is_built_in(tmp_path: Path) -> None:
    (tmp_path / "fits").mkdir()
    load_backends(fake_library(tmp_path, 0), tmp_path / "fits")  # raises if nothing has been loaded after it


def test_a_library_with_its_backends_needs_no_modules(tmp_path: Path) -> None:
    load_backends(fake_library(tmp_path, 1), tmp_path / "nowhere")


def test_no_module_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoBackend, match=re.escape(f"{tmp_path} holds none of ggml's modules")):
        load_backends(fake_library(tmp_path, 0), tmp_path)


def test_no_module_for_this_cpu_is_an_error_that_names_it(tmp_path: Path) -> None:
    for name in ("libggml-cpu-future.so", "libggml-cpu-distant.so"):
        (tmp_path / name).touch()
    with pytest.raises(NoBackend, match=r"none of the 2 modules .* runs on this CPU \(\w+.*\): install lt-gguf from its source"):
        load_backends(fake_library(tmp_path, 0), tmp_path)


def test_the_libraries_of_this_build_have_a_backend() -> None:
    load_backends(Path(load_llama_cpp().llama_cpp._lib._name), Path("nowhere"))


# an editable installation's import hook would find the checkout's package in place of the copy
WITHOUT_EDITABLE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != 'ScikitBuildRedirectingFinder']"


class Carrying:
    """The package as a wheel for other machines has it: libraries, and the binding in vendor/."""

    def __init__(self, path: Path, libraries: Path) -> None:
        self.site = path
        self.package = path / "lt_gguf"
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(libraries, self.package / "lib")
        binding = Path(find_spec("llama_cpp").origin).parent
        shutil.copytree(binding, self.package / "vendor" / "llama_cpp", ignore=shutil.ignore_patterns("__pycache__"))

    def python(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        without = {k: v for k, v in os.environ.items() if k not in ("LT_GGUF_LIB_PATH", "LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}
        environment = {**without, "PYTHONPATH": str(self.site), **environment}
        code = f"{WITHOUT_EDITABLE}\n{code}"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=self.site)


@pytest.fixture(scope="module")
def carrying(tmp_path_factory: pytest.TempPathFactory) -> Carrying:
    return Carrying(tmp_path_factory.mktemp("site"), library_dir())


def test_the_binding_that_the_package_carries_goes_before_an_installed_one(carrying: Carrying) -> None:
    done = carrying.python("import lt_gguf, llama_cpp, llama_cpp.llama_chat_format as m; print(llama_cpp.__file__, m.__file__)")
    vendor = carrying.package / "vendor" / "llama_cpp"
    assert done.stdout.split() == [str(vendor / "__init__.py"), str(vendor / "llama_chat_format.py")], done.stderr


def test_an_installed_binding_of_another_version_does_not_matter_then(carrying: Carrying) -> None:
    code = "from importlib import metadata; metadata.version = lambda name: '0.2.0'; import lt_gguf; print(lt_gguf.Llama.__name__)"
    done = carrying.python(code)
    assert done.stdout.strip() == "Llama", done.stderr


def test_no_installed_binding_does_not_matter_then(carrying: Carrying) -> None:
    code = """
from importlib import metadata
def missing(name): raise metadata.PackageNotFoundError(name)
metadata.version = missing
import lt_gguf
print(lt_gguf.Llama.__name__)
"""
    done = carrying.python(code)
    assert done.stdout.strip() == "Llama", done.stderr


def test_another_binding_imported_first_is_an_error(carrying: Carrying, tmp_path: Path) -> None:
    for path in library_dir().iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    done = carrying.python("import llama_cpp, lt_gguf", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert "import lt_gguf first" in done.stderr.strip().splitlines()[-1]


def test_importing_the_package_still_loads_no_library(carrying: Carrying) -> None:
    done = carrying.python("import sys, lt_gguf; print('llama_cpp' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


needs_modules = pytest.mark.skipif(PORTABLE is None, reason="there is no build with modules: make wheel makes one")


@pytest.fixture
def bare_libraries(tmp_path: Path) -> Path:
    """The libraries of the build with modules in a directory of their own, without the modules."""
    shutil.copytree(PORTABLE, tmp_path / "lib", ignore=lambda _, names: [name for name in names if not is_library(name)])
    return tmp_path / "lib"


def python(code: str, libraries: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LT_GGUF_LIB_PATH": str(libraries)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


COUNT = "import lt_gguf, llama_cpp; print(llama_cpp.llama_cpp._lib.ggml_backend_reg_count())"


@needs_modules
def test_a_script_that_imports_llama_cpp_has_backends_and_an_empty_screen() -> None:
    done = python(COUNT, PORTABLE)
    assert int(done.stdout) >= 2 and not done.stderr, done.stderr  # the CPU and RPC


@needs_modules
def test_libraries_without_modules_are_an_error(bare_libraries: Path) -> None:
    last = python("import lt_gguf, llama_cpp", bare_libraries).stderr.strip().splitlines()[-1]
    assert "LibraryError" in last and "holds none of ggml's modules" in last


@needs_modules
def test_modules_beside_the_tools_are_found(bare_libraries: Path) -> None:
    tools = bare_libraries.parent / "bin"
    tools.mkdir()
    for module in PORTABLE.glob("libggml-*-*.so"):
        shutil.copy(module, tools)
    done = python(COUNT, bare_libraries)
    assert int(done.stdout or 0) >= 1, done.stderr


def is_library(name: str) -> bool:
    return re.fullmatch(r"lib(llama|llama-common|ggml|ggml-base|mtmd)\.(so|dylib)", name) is not None
