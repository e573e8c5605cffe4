# A wheel for other machines (LT_PORTABLE): what is compiled, and what the result may ask of the system that it lands on.

# The first model that is loaded takes the best of ggml's variants for the CPU that it finds itself on.
set(GGML_NATIVE           OFF CACHE BOOL "what the building machine has, others may lack")
set(GGML_BACKEND_DL       ON  CACHE BOOL "backends are modules, loaded when needed")
set(GGML_CPU_ALL_VARIANTS ON  CACHE BOOL "a module for each kind of CPU")

# It would have to be carried along, and would grow old there. The tools download nothing over HTTPS then.
set(LLAMA_OPENSSL OFF CACHE BOOL "HTTPS in the tools")

# One function of libstdc++ 12 is all that would ask for a newer C++ library than glibc 2.34's distributions have (RHEL 9): carry it.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
try_compile(LT_LIBSTDCXX_12 "${CMAKE_CURRENT_BINARY_DIR}/condition_variable" "${CMAKE_CURRENT_LIST_DIR}/condition_variable.cpp"
    CXX_STANDARD 17)
unset(CMAKE_TRY_COMPILE_TARGET_TYPE)
if (LT_LIBSTDCXX_12) # else it is an older one, or another, which has no such function
    add_library(lt_condition_variable STATIC "${CMAKE_CURRENT_LIST_DIR}/condition_variable.cpp")
    set_target_properties(lt_condition_variable PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_STANDARD 17)
    link_libraries(lt_condition_variable)
    add_link_options("LINKER:--exclude-libs,liblt_condition_variable.a") # nobody else's business
endif()

# OpenMP stays on, and auditwheel carries libgomp along (0.1 MB). With a core for each thread ggml's own threads are as fast: SmolLM2-135M
# on 2 cores read 283 to 295 tokens/s and decoded 84 to 89 with it, 275 to 290 and 77 to 93 without. But they spin where libgomp's go to
# sleep: 4 threads on 2 cores decoded 42 tokens/s with it, and without it not 4 tokens in 40 s.
