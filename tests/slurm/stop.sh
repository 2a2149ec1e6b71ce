#!/usr/bin/env bash
# Ends what start.sh FOLDER started.
for pid in "$1"/slurmd.pid "$1"/slurmctld.pid "$1"/munge/pid; do
  [ -e "$pid" ] && kill "$(cat "$pid")"
done
true
