# llama-quantize without llama-common, of which it needs four files: the whole of it takes a minute and a half on two cores, and
# whoever only wants to convert and run a model waits for nothing else of it.

if (APPLE) # its linker has no --gc-sections, and nobody has tried here whether -dead_strip bears what those files leave undefined
    set(LT_QUANTIZE llama-quantize)
    return()
endif()

set(LT_QUANTIZE lt-quantize)
add_executable(lt-quantize
    "${LT_SOURCE_TREE}/tools/quantize/main.cpp"
    "${LT_SOURCE_TREE}/tools/quantize/quantize.cpp"
    "${LT_SOURCE_TREE}/common/common.cpp"
    "${LT_SOURCE_TREE}/common/imatrix-loader.cpp"
    "${LT_SOURCE_TREE}/common/json.cpp"
    "${LT_SOURCE_TREE}/common/log.cpp")
set_target_properties(lt-quantize PROPERTIES OUTPUT_NAME llama-quantize EXCLUDE_FROM_ALL ON
    RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lt") # upstream's, which is built only where somebody asks for it, is in bin/
target_compile_features(lt-quantize PRIVATE cxx_std_17)
target_include_directories(lt-quantize PRIVATE "${LT_SOURCE_TREE}/common" "${LT_SOURCE_TREE}/src")
target_link_libraries(lt-quantize PRIVATE llama-common-base llama ggml vendor::nlohmann vendor::sheredom ${CMAKE_THREAD_LIBS_INIT})
# What common.cpp calls in the rest of llama-common is in functions that nothing here calls, and goes with them.
target_compile_options(lt-quantize PRIVATE -ffunction-sections -fdata-sections)
target_link_options(lt-quantize PRIVATE -Wl,--gc-sections)
