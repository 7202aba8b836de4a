"""The benchmark. `measure.bench` and `compare.compare` measure artifacts, `http.bench_url` a service; `process.run_job` is
one measurement in a process of its own, for those who look for settings.

Each file knows only those before it: statistics, prompts, workloads, traffic, watch → worker (a process of its own) →
process → schedule → report → plots, page → measure, compare, http.
"""
