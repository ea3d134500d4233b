"""rules_cc's names for the C++ rules that are built into Bazel 4."""

cc_binary = native.cc_binary
cc_import = native.cc_import
cc_library = native.cc_library
cc_proto_library = native.cc_proto_library
cc_test = native.cc_test
cc_toolchain = native.cc_toolchain
cc_toolchain_alias = native.cc_toolchain_alias
cc_toolchain_suite = native.cc_toolchain_suite
fdo_prefetch_hints = native.fdo_prefetch_hints
fdo_profile = native.fdo_profile
objc_library = native.objc_library

def _nothing(_ctx):
    return []

# Loaded by Bazel's own files, never built here.
cc_flags_supplier = rule(implementation = _nothing)
compiler_flag = rule(implementation = _nothing)
