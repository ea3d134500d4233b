# jaxfabric_layer(<folder> [DEPS <lower folders>...] [LIBS <libraries>...]):
# target jaxfabric_<folder> from every .cc of the calling folder. Headers are
# included as "<folder>/<file>.h", relative to xla_ffi/.
function(jaxfabric_layer folder)
  cmake_parse_arguments(ARG "" "" "DEPS;LIBS" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cc)
  list(TRANSFORM ARG_DEPS PREPEND jaxfabric_)
  set(layer jaxfabric_${folder})
  if(sources)
    add_library(${layer} STATIC ${sources})
    jaxfabric_warnings(${layer})
    set(scope PUBLIC)
  else()  # headers only
    add_library(${layer} INTERFACE)
    set(scope INTERFACE)
  endif()
  target_include_directories(${layer} ${scope} ${PROJECT_SOURCE_DIR}/xla_ffi)
  target_link_libraries(${layer} ${scope} ${ARG_DEPS} ${ARG_LIBS})
endfunction()

# Warnings are errors in our own code. Not set globally: nanobind's sources are
# built by the same project and are not ours to fix. Designated initializers name
# the fields that matter; the others take their defaults.
function(jaxfabric_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Werror
                                           -Wno-missing-field-initializers)
endfunction()
