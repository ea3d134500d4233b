#!/bin/sh
# The module loads: nothing was left undefined. $1: a Python, $2: the module.
exec sh "$1" -c "
import importlib.util
spec = importlib.util.spec_from_file_location('_native', '$2')
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"
