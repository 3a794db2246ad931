import requests

def download_cached(source_url, dest_path, checksum=None):
    """Download artifact through cache"""
    params = {"url": source_url}
    if checksum:
        params["sha256"] = checksum
    
    response = requests.get(
        "https://artifactcache.lan/fetch",
        params=params,
        stream=True
    )
    
    if response.status_code == 200:
        with open(dest_path, "wb") as f:
            for chunk in response.iter_content(chunk_size=8192):
                f.write(chunk)
        
        cache_status = response.headers.get("X-Cache-Status")
        content_hash = response.headers.get("X-Content-SHA256")
        
        return {
            "success": True,
            "cache_hit": cache_status == "HIT",
            "hash": content_hash
        }
    else:
        error = response.json()
        return {
            "success": False,
            "error": error
        }

# Usage
result = download_cached(
    "https://github.com/prometheus/prometheus/releases/download/v2.45.0/prometheus-2.45.0.linux-amd64.tar.gz",
    "/tmp/prometheus.tar.gz",
    checksum="7a1b2c3d4e5f..."
)

print(f"Cache hit: {result['cache_hit']}")
