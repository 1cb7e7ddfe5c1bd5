#!/bin/sh
# keep_report.sh OBJECT COMMAND...: runs a compiler and keeps what it said in OBJECT.log.
object=$1
shift
"$@" 2>"$object.log"
status=$?
grep -v -E "ptxas info|bytes stack frame" "$object.log" >&2
exit $status
