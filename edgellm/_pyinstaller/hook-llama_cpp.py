"""The libraries lie in the package's folder `lib`, where its bindings look; its version is read from its source."""

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs

binaries = collect_dynamic_libs("llama_cpp", search_patterns=["*.so", "*.so.*", "*.dylib", "*.dll"])
datas = collect_data_files("llama_cpp", include_py_files=True, includes=["__init__.py"])
