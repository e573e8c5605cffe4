# What of llama.cpp goes into the Python package, and where.

set(LT_TOOLS
    llama-server
    llama-cli
    llama-bench
    llama-batched-bench
    llama-perplexity
    llama-quantize
    llama-imatrix
    ggml-rpc-server
    CACHE STRING "llama.cpp's tools that are built: the demo waits for llama-quantize alone")
if (TARGET ggml-rpc-server)
    set_target_properties(ggml-rpc-server PROPERTIES OUTPUT_NAME rpc-server)
else()
    list(REMOVE_ITEM LT_TOOLS ggml-rpc-server)
endif()

# Every library of upstream's that the tools and the binding load. mtmd (images and sound) is one that llama-server links and
# llama_cpp loads by name when a model has pictures to look at.
set(LT_LIBRARIES ggml-base ggml llama)
if (GGML_BACKEND_DL)
    # ggml looks for its modules beside the running program; lt_gguf.runtime.library names the place in a Python process.
    set(LT_MODULES ${GGML_AVAILABLE_BACKENDS})
else()
    list(APPEND LT_LIBRARIES ${GGML_AVAILABLE_BACKENDS})
endif()
list(TRANSFORM LT_TOOLS REPLACE "^llama-quantize$" "${LT_QUANTIZE}")
if (NOT LT_TOOLS STREQUAL "lt-quantize")
    list(APPEND LT_LIBRARIES llama-common mtmd)
endif()
foreach (tool IN LISTS LT_TOOLS)
    list(APPEND LT_LIBRARIES ${tool}-impl)
endforeach()
foreach (library IN LISTS LT_LIBRARIES LT_MODULES)
    if (TARGET ${library}) # not every tool has a library of its own, and a cached backend may be switched off by now
        if (library IN_LIST LT_MODULES)
            list(APPEND LT_MODULE_TARGETS ${library})
        else()
            list(APPEND LT_LIBRARY_TARGETS ${library})
        endif()
        # A wheel can't hold symbolic links, and would hold libllama.so, .so.0 and .so.0.5.0 as three copies.
        set_property(TARGET ${library} PROPERTY VERSION)
        set_property(TARGET ${library} PROPERTY SOVERSION)
        set_property(TARGET ${library} PROPERTY PUBLIC_HEADER) # and needs no headers
    endif()
endforeach()

add_custom_target(lt_gguf ALL DEPENDS ${LT_TOOLS} ${LT_LIBRARY_TARGETS} ${LT_MODULE_TARGETS})

# Only this component goes into the wheel: upstream's own rules would add headers, CMake files and pkg-config files.
install(TARGETS ${LT_LIBRARY_TARGETS} COMPONENT lt_gguf
    LIBRARY DESTINATION lt_gguf/lib
    RUNTIME DESTINATION lt_gguf/lib)
install(TARGETS ${LT_TOOLS} ${LT_MODULE_TARGETS} COMPONENT lt_gguf
    RUNTIME DESTINATION lt_gguf/bin
    LIBRARY DESTINATION lt_gguf/bin)

# The binding's Python files, where the wheel can't name a package of them that other machines would find.
if (LT_PORTABLE)
    install(DIRECTORY "${LT_BINDING}/llama_cpp" COMPONENT lt_gguf DESTINATION lt_gguf/vendor)
endif()

# The converter's half that is Python. gguf-py comes from the same source: PyPI's gguf has the same version number, 0.19.0, but an
# older content (hundreds of constants and tensor names fewer), and conversion/ does not run with it.
install(FILES "${LT_SOURCE_TREE}/convert_hf_to_gguf.py" COMPONENT lt_gguf DESTINATION lt_gguf/upstream)
install(DIRECTORY "${LT_SOURCE_TREE}/conversion" COMPONENT lt_gguf DESTINATION lt_gguf/upstream
    PATTERN __pycache__ EXCLUDE)
install(DIRECTORY "${LT_SOURCE_TREE}/gguf-py/gguf" COMPONENT lt_gguf DESTINATION lt_gguf/upstream/gguf-py
    PATTERN __pycache__ EXCLUDE)

# The notices of all that is compiled in or copied (NOTICE lists them).
install(FILES "${LT_SOURCE_TREE}/LICENSE" COMPONENT lt_gguf DESTINATION lt_gguf/upstream/licenses RENAME LICENSE-llama.cpp)
install(FILES "${LT_SOURCE_TREE}/gguf-py/LICENSE" COMPONENT lt_gguf DESTINATION lt_gguf/upstream/licenses RENAME LICENSE-gguf-py)
install(DIRECTORY "${LT_SOURCE_TREE}/licenses/" COMPONENT lt_gguf DESTINATION lt_gguf/upstream/licenses)
file(GLOB_RECURSE LT_VENDORED_LICENSES RELATIVE "${LT_SOURCE_TREE}/vendor" "${LT_SOURCE_TREE}/vendor/LICENSE*")
foreach (licence IN LISTS LT_VENDORED_LICENSES)
    get_filename_component(component "${licence}" DIRECTORY)
    get_filename_component(component "${component}" NAME)
    install(FILES "${LT_SOURCE_TREE}/vendor/${licence}" COMPONENT lt_gguf DESTINATION lt_gguf/upstream/licenses RENAME LICENSE-${component})
endforeach()

# auditwheel puts GCC's OpenMP library into a portable wheel, unchanged: its licence and the exception that allows it go along.
if (LT_PORTABLE AND CMAKE_SYSTEM_NAME STREQUAL "Linux" AND GGML_OPENMP)
    file(GLOB LT_LIBGOMP_LICENSES /usr/share/doc/libgomp1/copyright /usr/share/common-licenses/GPL-3 # Debian
        /usr/share/licenses/libgomp/COPYING3 /usr/share/licenses/libgomp/COPYING.RUNTIME)            # Fedora, RHEL
    if (NOT LT_LIBGOMP_LICENSES)
        message(WARNING "no licence of libgomp was found on this machine: the wheel that carries it needs one beside it")
    endif()
    foreach (licence IN LISTS LT_LIBGOMP_LICENSES)
        get_filename_component(name "${licence}" NAME)
        file(REAL_PATH "${licence}" licence)
        install(FILES "${licence}" COMPONENT lt_gguf DESTINATION lt_gguf/upstream/licenses RENAME LICENSE-libgomp-${name})
    endforeach()
endif()
