"""A job: from a YAML file, the command line or Python to a plan for a cluster. Needs neither Ray nor torch.

file, --set ─▶ load ─▶ check ─▶ Job ─┬─▶ identity: may this job resume that run?
Job(...)  ────────────▶  ▲           ├─▶ plan: steps, samples and micro batches at a world size
                         │           └─▶ search: the job of each trial of a sweep
         schema, rules, foreign

schema, tune   every key with its type, default and meaning; section is their base class
load           YAML and `--set`, with the line of each key; a job as YAML
check          every problem of a job in one JobError: fields first, then rules
rules          constraints between keys
foreign        keys of other trainers, and what they are called in a job
values         a job as plain mappings and lists, and key paths into them
identity       the keys that decide the trained weights, and the differences between two jobs
plan           arithmetic: steps, samples, micro batches
segments       an extended run: its sources and weights from each step on, and which jobs may extend it
search         the job of one trial of a sweep
functions      the user's functions, named as module:function
deepspeed      DeepSpeed's configuration, merged from the job and the user's own keys
"""
