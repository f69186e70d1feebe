#!/bin/sh
# Remakes every golden of tests/data. Needs the packages of requirements.txt, and some minutes.
set -e
cd "$(dirname "$0")"
for script in tokens sampling networks sag; do python3 "$script.py"; done
