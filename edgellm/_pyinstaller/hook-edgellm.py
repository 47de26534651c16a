"""edgellm imports much of itself only when it is needed, and llama.cpp's bindings by name."""

from PyInstaller.utils.hooks import collect_data_files, collect_submodules

hiddenimports = [*collect_submodules("edgellm", filter=lambda name: "_pyinstaller" not in name), "llama_cpp.llama_cpp"]
datas = collect_data_files("edgellm")
