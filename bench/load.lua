-- What wrk asks for, and how it reports. Arguments after "--":
--   (none)              the URL of the command line, again and again
--   range PATH SIZE LEN random ranges of LEN bytes
--   list FILE           the paths in FILE, one after another
local make = nil

function init(args)
    if args[1] == "range" then
        math.randomseed(1)
        local path, size, len = args[2], tonumber(args[3]), tonumber(args[4])
        make = function()
            local from = math.random(0, size - len)
            return wrk.format("GET", path, { ["Range"] = string.format("bytes=%d-%d", from, from + len - 1) })
        end
    elseif args[1] == "list" then
        local requests, at = {}, 0
        for path in io.lines(args[2]) do requests[#requests + 1] = wrk.format("GET", path) end
        make = function()
            at = at % #requests + 1
            return requests[at]
        end
    else
        local one = wrk.format("GET")
        make = function() return one end
    end
end

function request() return make() end

function done(summary, latency)
    local e = summary.errors
    io.write(string.format(
        'RESULT {"requests": %d, "bytes": %.0f, "seconds": %.6f, "p50_us": %.0f, "p99_us": %.0f, "max_us": %.0f, "errors": %d}\n',
        summary.requests, summary.bytes, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
        latency.max, e.connect + e.read + e.write + e.status + e.timeout))
end
