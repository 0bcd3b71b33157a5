# Teachers: one job per seed, since every student waits for its own.


rule teacher:
    output:
        touch("results/runs/{benchmark}/teacher/{batch}.trained"),
    params:
        seeds=lambda w: WORKFLOW.job(w.benchmark, "teacher", w.batch).seeds,
    resources:
        dispatch="local",
        request=lambda w: WORKFLOW.request(w.benchmark, "teacher", "train"),
    retries: WORKFLOW.retries
    message:
        "teacher of {wildcards.benchmark}, seed {params.seeds}"
    shell:
        "exec python -m distillbench.cluster.dispatch {resources.dispatch} {output} {resources.request:q} train {wildcards.benchmark} teacher --seeds {params.seeds}"
