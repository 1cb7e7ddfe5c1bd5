"""What `torchops bench` runs, from the first step to the last:

- problem, parse: one layer call as numbers, and as a string such as conv2d:mb8_ic64ih56oc64kh3ph1
- models/, suites: networks, and the problems that each consists of
- counts, roofline: the fewest bytes and FLOPs of a problem, and what the machine can do
- workload, native, steps: tensors, what a user of torch writes, and the calls that are timed
- timing, memory, match: seconds, peak bytes, and whether the result is right
- subject, run: one case, and a whole plan of them
- statistics, results, totals: medians and verdicts, the result file, networks per op family
- report, page, plot, compare: terminal, HTML, roofline picture, two files side by side
- cli: the command line; environment, extras, units: what the others need
"""
