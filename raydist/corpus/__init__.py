"""Source files to a token log: the documents of one source as token ids, in Arrow files in a fixed order.

    Source ─▶ files ─▶ slices ─▶ formats ─▶ clean ─▶ tokenizer ─▶ log ─▶ TokenLog ─▶ raydist.feed
    (job)     File     parts of  Record,    text     token ids    shards
                       files     Bad

    locations   File; opening a local path or a URI
    files       which files a source names
    formats/    readers of file formats; READERS is the table of them
    slices      the units of work, planned from the files
    splits      the split of a data set in a folder: by its card, by save_to_disk, by names
    source      a source as a whole: its files, options and cleaning, and its plan
    clean       cleaning steps, named ones and a user's own functions
    tokenizer   text to token ids; training a tokenizer
    sentencepiece  tokenizers that are stored as a SentencePiece model alone
    log_folder  the folder of a token log: every name in it
    log         the token log: slices written as shards, and read again
    pipeline    one Ray Data task per slice: read, clean and tokenize, write
    build       plans a token log, makes its missing slices, writes the manifest; estimates

A token log is a pure function of the source files, how they are read and cleaned, and the tokenizer. Its
name is the fingerprint of these.

A record that cannot be read goes this way:

    reader ─▶ Bad ─▶ Piece.bad ─▶ quarantine/<slice>.jsonl ─▶ quarantine.jsonl
    (formats)        (pipeline)   (log: SliceWriter.commit)   n_quarantined in manifest.json
                                                              (build: _finish)

The slice's commit record counts them too. With corpus.on_error "fail", BadRecords is raised once such a slice
is committed. A later build reads the slice again, unless the token log is complete, and refuses it as long as
it holds one. With "quarantine" they are left out.
"""
