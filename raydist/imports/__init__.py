"""Config files of other trainers, turned into job files.

    autotrain   an AutoTrain config file as a job file, by the table in raydist.autotrain

A comment at the head of a job file explains each key that has no counterpart.
"""
