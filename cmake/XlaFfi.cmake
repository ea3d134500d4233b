# Finds Python, nanobind and the XLA FFI headers that jaxlib ships.
# Sets XLA_FFI_INCLUDE_DIR (pass -DXLA_FFI_INCLUDE_DIR=... to override).
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module
             OPTIONAL_COMPONENTS Development.SABIModule)

if(NOT XLA_FFI_INCLUDE_DIR)
  # find_spec locates jaxlib without importing it: jax itself need not be in the
  # build environment.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; s = u.find_spec('jaxlib'); \
print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE jaxlib_dir OUTPUT_STRIP_TRAILING_WHITESPACE
    COMMAND_ERROR_IS_FATAL ANY)
  if(NOT jaxlib_dir)
    message(FATAL_ERROR "${Python_EXECUTABLE} has no jaxlib, which ships the "
                        "XLA FFI headers: pip install 'jaxlib>=0.9.1,<0.11.1'")
  endif()
  set(XLA_FFI_INCLUDE_DIR "${jaxlib_dir}/include")
endif()

# A handler carries the API minor of its headers, and XLA refuses handlers that
# are newer than itself by failing to start the whole CPU backend.
set(c_api "${XLA_FFI_INCLUDE_DIR}/xla/ffi/api/c_api.h")
if(NOT EXISTS "${c_api}")
  message(FATAL_ERROR "no XLA FFI headers at ${c_api}")
endif()
file(STRINGS "${c_api}" minor_line REGEX "#define XLA_FFI_API_MINOR ")
string(REGEX MATCH "[0-9]+" xla_ffi_minor "${minor_line}")
message(STATUS "XLA FFI headers: API 0.${xla_ffi_minor}, ${XLA_FFI_INCLUDE_DIR}")
if(xla_ffi_minor GREATER 3)
  message(WARNING "built against FFI API 0.${xla_ffi_minor}: this module will "
                  "not load under jaxlib 0.9.1 to 0.11.0, which have 0.3. "
                  "Build with jaxlib<0.11.1 to serve all supported versions.")
elseif(xla_ffi_minor LESS 3)
  message(FATAL_ERROR "FFI API 0.${xla_ffi_minor} headers are too old: "
                      "pip install 'jaxlib>=0.9.1,<0.11.1'")
endif()

execute_process(
  COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir
  OUTPUT_VARIABLE nanobind_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE
  COMMAND_ERROR_IS_FATAL ANY)
find_package(nanobind CONFIG REQUIRED)
