"""Local stand-ins for repositories that an old Bazel would download."""

def compat_repositories():
    """Declares them for Bazel before 5; newer ones carry their own."""
    version = native.bazel_version  # Empty in Debian's 4.2.3.
    major = int(version.split(".")[0]) if version else 0
    if major >= 5:
        return
    native.local_repository(
        name = "rules_cc",
        path = "third_party/rules_cc_stub",
    )
    native.local_repository(
        name = "rules_java",
        path = "/usr/share/bazel/rules/java",
    )
    native.local_repository(
        name = "remote_coverage_tools",
        path = "third_party/coverage_stub",
    )
