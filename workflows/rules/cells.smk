# Students: a job trains and samples every seed of one arm; another evaluates the samples of an arm or a teacher.
# No input is `ancient`: after a kill Snakemake forces incomplete jobs, and then forgets what hangs on them through ancient
# inputs only. A job whose records are there does nothing but renew its stamp.
ruleorder: teacher > train


rule train:
    input:
        needed_by,
    output:
        touch("results/runs/{benchmark}/{arm}/{batch}.trained"),
    params:
        seeds=lambda w: job_of(w).seeds,
    resources:
        dispatch="local",
        request=request("train"),
    retries: RETRIES
    message:
        "train {wildcards.arm} on {wildcards.benchmark}, seeds {params.seeds}"
    shell:
        "exec python -m distillbench.dispatch {resources.dispatch} {output} {resources.request:q} train {wildcards.benchmark} {wildcards.arm} --seeds {params.seeds}"


rule evaluate:
    input:
        "results/runs/{benchmark}/{arm}/{batch}.trained",
        needed_by,
    output:
        touch("results/runs/{benchmark}/{arm}/{batch}.evaluated"),
    params:
        seeds=lambda w: job_of(w).seeds,
    resources:
        dispatch="local",
        request=request("evaluate"),
    retries: RETRIES
    message:
        "evaluate {wildcards.arm} on {wildcards.benchmark}, seeds {params.seeds}"
    shell:
        "exec python -m distillbench.dispatch {resources.dispatch} {output} {resources.request:q} evaluate {wildcards.benchmark} {wildcards.arm} --seeds {params.seeds}"
