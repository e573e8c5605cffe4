# Our defaults for llama.cpp's options. None is forced: -DNAME=VALUE in CMAKE_ARGS wins over each.

option(LT_PORTABLE "a wheel for other machines, see portable.cmake" OFF)
if (LT_PORTABLE)
    include(cmake/portable.cmake)
endif()

set(BUILD_SHARED_LIBS  ON CACHE BOOL "ctypes loads libllama, and the tools share it")
set(LLAMA_BUILD_COMMON ON CACHE BOOL "the tools need it")
set(LLAMA_BUILD_TOOLS  ON CACHE BOOL "")
set(LLAMA_BUILD_SERVER ON CACHE BOOL "llama-server, and llama-cli is built on it")
set(GGML_RPC           ON CACHE BOOL "rpc-server, and the backend that reaches it")

# A build that has the pinned source needs no network: upstream's default fetches a prebuilt web page for llama-server, and
# building that page takes npm and 700 MB of its packages. Without it llama-server answers its HTTP API and shows no page.
set(LLAMA_BUILD_UI        OFF CACHE BOOL "build llama-server's page with npm")
set(LLAMA_USE_PREBUILT_UI OFF CACHE BOOL "download llama-server's page")

# OpenSSL lets the tools fetch models over HTTPS (-hf). Upstream takes it where its headers are and warns where they aren't.
set(LLAMA_OPENSSL ON CACHE BOOL "HTTPS in the tools, where OpenSSL is found")

# Upstream's warnings are for its developers; here they would bury the line that says why a build failed.
set(LLAMA_ALL_WARNINGS OFF CACHE BOOL "")

set(LLAMA_BUILD_COMMIT "${LT_UPSTREAM_COMMIT}")

# Upstream asks git which commit it is built from and compiles the answer in. The tree isn't a repository, so git would find the
# one around it, and each commit there would recompile ggml.
get_filename_component(LT_SOURCE_PARENT "${LT_SOURCE_TREE}/.." REALPATH)
set(ENV{GIT_CEILING_DIRECTORIES} "${LT_SOURCE_PARENT}")

# Libraries lie in lib/ and tools in bin/ beside it; in the build directory all of them lie together.
if (APPLE)
    set(CMAKE_INSTALL_RPATH "@loader_path;@loader_path/../lib")
else()
    set(CMAKE_INSTALL_RPATH "$ORIGIN;$ORIGIN/../lib")
endif()
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON) # CUDA's libraries, where they aren't on the loader's path
