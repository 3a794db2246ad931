//! The functions that every request pays for, each alone: `cargo bench --bench hot`.
//!
//! What a whole hit costs is told without noise by `bench/instructions`, and beside other servers by `bench/run`.

use std::hint::black_box;

use artifact_cache::{
    artifact::{Digest, Hasher, SourceUrl, Version, globs::QueryGlobs, media},
    server::hot,
    telemetry::{Metrics, metrics::Outcome},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const PLAIN: &str = "https://downloads.example.org/releases/v1.2.3/tool-1.2.3-linux-x86_64.tar.gz";
const SIGNED: &str = "https://bucket.s3.amazonaws.com/tool-1.2.3.tar.gz?X-Amz-Algorithm=AWS4-HMAC-SHA256\
                      &X-Amz-Credential=AKIA%2F20260101%2Fus-east-1&X-Amz-Date=20260101T000000Z&X-Amz-Expires=300\
                      &X-Amz-SignedHeaders=host&X-Amz-Signature=0123456789abcdef";

fn url_key(c: &mut Criterion) {
    let ignore = QueryGlobs::new(&["X-Amz-*", "response-* if X-Amz-Signature"]).expect("both are patterns");
    let mut group = c.benchmark_group("url_key");
    for (name, url) in [("plain", PLAIN), ("signed", SIGNED)] {
        group.bench_function(name, |b| {
            b.iter(|| SourceUrl::parse(black_box(url), &ignore).expect("it is a URL").key().len())
        });
    }
    group.bench_function("masked for the log", |b| {
        let url = SourceUrl::parse(SIGNED, &ignore).expect("it is a URL");
        b.iter(|| black_box(&url).masked().len())
    });
}

fn digest(c: &mut Criterion) {
    let mut group = c.benchmark_group("digest");
    group.bench_function("parse", |b| {
        let text = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        b.iter(|| Digest::parse_param(black_box(text)).is_ok())
    });
    let block = vec![7; 1 << 20];
    group.throughput(Throughput::Bytes(block.len() as u64));
    group.bench_function("hash 1 MiB", |b| {
        b.iter(|| {
            let mut hasher = Hasher::new();
            hasher.update(black_box(&block));
            hasher.finish()
        })
    });
}

fn headers(c: &mut Criterion) {
    let mut group = c.benchmark_group("headers");
    group.bench_function("content_disposition", |b| {
        b.iter(|| media::content_disposition(black_box(Some("tool-1.2.3-linux-x86_64.tar.gz"))))
    });
    group.bench_function("media_type", |b| b.iter(|| media::media_type(black_box(b"application/gzip"))));
}

fn ranges(c: &mut Criterion) {
    let mut group = c.benchmark_group("ranges");
    for (name, range) in
        [("none", None), ("one", Some("bytes=65536-131071")), ("three", Some("bytes=0-9,20-29,-5"))]
    {
        let mut headers = http::HeaderMap::new();
        headers.insert("user-agent", http::HeaderValue::from_static("curl/8.5.0"));
        if let Some(range) = range {
            headers.insert("range", http::HeaderValue::from_static(range));
        }
        group.bench_function(name, |b| b.iter(|| hot::judge(black_box(&headers), 1 << 30)));
    }
}

fn answers(c: &mut Criterion) {
    let version = Version {
        digest: "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
            .parse()
            .expect("it is a digest"),
        size: 1 << 20,
        content_type: Some("application/gzip".to_owned()),
        content_encoding: None,
        file_name: Some("tool-1.2.3-linux-x86_64.tar.gz".to_owned()),
        etag: None,
        last_modified: None,
        fetched: std::time::SystemTime::UNIX_EPOCH,
    };
    let mut group = c.benchmark_group("answer");
    group.bench_function("built", |b| b.iter(|| hot::describe(black_box(&version))));
    let kept = hot::describe(&version);
    group.bench_function("kept", |b| b.iter(|| black_box(&kept).clone()));
}

fn metrics(c: &mut Criterion) {
    let metrics = Metrics::new(|| 0);
    let took = std::time::Duration::from_micros(50);
    c.bench_function("metrics/request_ended", |b| {
        b.iter(|| metrics.request_ended(black_box(Outcome::Hit), took, 1024))
    });
}

criterion_group!(benches, url_key, digest, headers, metrics, ranges, answers);
criterion_main!(benches);
