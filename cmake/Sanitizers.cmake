# JAXFABRIC_SANITIZE=address (with UBSan) or thread, for the C++ tests.
set(JAXFABRIC_SANITIZE "" CACHE STRING "address, thread or empty")
set_property(CACHE JAXFABRIC_SANITIZE PROPERTY STRINGS "" address thread)

if(JAXFABRIC_SANITIZE STREQUAL "")
  return()
elseif(JAXFABRIC_SANITIZE STREQUAL "address")
  set(sanitizers address,undefined)
  # A third of the compilation. What null and object-size find ends in a report of
  # AddressSanitizer, too; wrong casts (vptr) are not looked for.
  set(left_out -fno-sanitize=null,object-size,vptr)
elseif(JAXFABRIC_SANITIZE STREQUAL "thread")
  set(sanitizers thread)
else()
  message(FATAL_ERROR "JAXFABRIC_SANITIZE must be 'address' or 'thread', "
                      "not '${JAXFABRIC_SANITIZE}'")
endif()
if(JAXFABRIC_BUILD_PYTHON)
  # TSan hangs inside an uninstrumented jaxlib, and ASan needs LD_PRELOAD there.
  message(FATAL_ERROR
          "sanitizers are for the C++ tests: add -DJAXFABRIC_BUILD_PYTHON=OFF")
endif()

# -O1 and -UNDEBUG come after the build type's flags and override them, so that
# debug checks run too.
add_compile_options(-fsanitize=${sanitizers} ${left_out} -fno-sanitize-recover=all
                    -fno-omit-frame-pointer -g1 -O1 -UNDEBUG)
add_link_options(-fsanitize=${sanitizers})
