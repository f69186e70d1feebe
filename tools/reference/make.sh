#!/bin/sh
# Remakes every golden of tests/data. Needs the packages of requirements.txt, and some minutes.
set -e
cd "$(dirname "$0")"
for script in tokens sampling networks lora families sag pictures; do python3 "$script.py"; done
