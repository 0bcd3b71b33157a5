# Students: a job trains and samples every seed of one arm; another evaluates the samples of an arm or a teacher.
# No input is `ancient`: after a kill Snakemake forces incomplete jobs, and then forgets what hangs on them through ancient
# inputs only. A job whose records are there does nothing but renew its stamp.
ruleorder: teacher > train


def job_of(wildcards):
    return WORKFLOW.job(wildcards.benchmark, wildcards.arm, wildcards.batch)


def needed_by_job(wildcards):
    return WORKFLOW.needed_by(job_of(wildcards))


rule train:
    input:
        needed_by_job,
    output:
        touch("results/runs/{benchmark}/{arm}/{batch}.trained"),
    params:
        seeds=lambda w: job_of(w).seeds,
    resources:
        dispatch="local",
        request=lambda w: WORKFLOW.request(w.benchmark, w.arm, "train"),
    retries: WORKFLOW.retries
    message:
        "train {wildcards.arm} on {wildcards.benchmark}, seeds {params.seeds}"
    shell:
        "exec python -m distillbench.cluster.dispatch {resources.dispatch} {output} {resources.request:q} train {wildcards.benchmark} {wildcards.arm} --seeds {params.seeds}"


rule evaluate:
    input:
        "results/runs/{benchmark}/{arm}/{batch}.trained",
        needed_by_job,
    output:
        touch("results/runs/{benchmark}/{arm}/{batch}.evaluated"),
    params:
        seeds=lambda w: job_of(w).seeds,
    resources:
        dispatch="local",
        request=lambda w: WORKFLOW.request(w.benchmark, w.arm, "evaluate"),
    retries: WORKFLOW.retries
    message:
        "evaluate {wildcards.arm} on {wildcards.benchmark}, seeds {params.seeds}"
    shell:
        "exec python -m distillbench.cluster.dispatch {resources.dispatch} {output} {resources.request:q} evaluate {wildcards.benchmark} {wildcards.arm} --seeds {params.seeds}"
