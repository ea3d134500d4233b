"""One C++ library per folder of xla_ffi/."""

# As in cmake/Layers.cmake.
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"]

def jaxfabric_layer(name, deps = [], copts = [], linkopts = [], alwayslink = False):
    """Declares the calling folder's library.

    The sandbox holds the headers of `deps` only, so that an include of a folder
    that is not a dependency does not build.

    Args:
      name: the folder's name.
      deps: the lower layers, and repositories from WORKSPACE.
      copts: compiler flags beside the usual warnings.
      linkopts: flags for whoever links this.
      alwayslink: links all of it, whether somebody calls it or not.
    """
    native.cc_library(
        name = name,
        srcs = native.glob(["*.cc"]),
        hdrs = native.glob(["*.h"]),
        alwayslink = alwayslink,
        copts = WARNINGS + ["-fvisibility=hidden"] + copts,
        linkopts = linkopts,
        linkstatic = True,
        strip_include_prefix = "/xla_ffi",
        visibility = ["//visibility:public"],
        deps = deps,
    )
