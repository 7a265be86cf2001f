"""Ray clusters: start one, check it, join it, send it jobs, train on it.

raydist cluster up ──> launch            raydist doctor ──> doctor ──> checks
raydist submit ──> submit ──Jobs API──> raydist train, in the cluster ──> connect ──> trainer
                     └──> remote: follow, find, stop the job               resources ──┘

connect      joins a cluster, or starts an embedded Ray on this machine; temporary: that one's folder
session      what a driver works on: is that Ray still there, and a new one in its place
resources    how many workers the nodes hold, and what training leaves free
trainer      one attempt at training, with Ray Train; network: the process group of its workers;
             groups: frees what workers reserve whose controller died
worker       what runs in each of them
ranks        ends the processes of an attempt that hangs
drain        nodes that are to be taken away, and when
ray_output   what Ray prints itself, in a file
submit       sends a job, this version of raydist and the user's own modules
remote       the jobs of a cluster: found by their run, followed, stopped
doctor       examines every node; checks: what its facts mean
launch       cluster files, and clusters up and down by Ray's launcher or kubectl
"""
