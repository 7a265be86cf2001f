"""Config files of other trainers, turned into job files: `raydist import FILE`.

    file ─▶ recognize ─▶ autotrain, axolotl or llama_factory ─▶ draft ─▶ job file
                                        axolotl and llama_factory use trainer and data

    recognize       whose config a file is, by its keys; what is refused, and why
    autotrain       AutoTrain's, by the table in raydist.autotrain
    axolotl         axolotl's: data sets of type completion, or a pretraining_dataset
    llama_factory   LLaMA-Factory's: stage pt, with its dataset_info.json
    trainer         what the latter two share: the arguments of Hugging Face's Trainer
    data            their data sets as sources: local, by URI, or of the hub
    draft           a job in the making; the comments; the file's text

Names and reasons come from raydist.job.foreign, the table of other trainers' keys, unless a value has to be
converted. A comment at the head of the job file explains each key that did not become one.
"""
