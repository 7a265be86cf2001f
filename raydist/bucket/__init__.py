"""Runs and token logs on an object store: s3://, gs://, az://.

Each node has a copy of what it reads or writes in a folder of its own, the mirror. The bucket is the
authority: what it does not hold does not count. Code outside of this package works on paths of the mirror;
writing and removing files (raydist/files.py) reaches the bucket first.

    objects    one bucket: get, put, create, replace, list, delete; retries, and errors that say what to do
    mirror     a path of the mirror and its object; publish, fetch, pull, remove; the cache of large files
    lease      who may write, by an object with heartbeats; in place of flock
    appended   records that are appended: numbered parts, since an object cannot grow
    check      whether a bucket can be used, before anything is spent
"""
