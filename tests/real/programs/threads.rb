# Threads with queues, Timeout (a timer thread), garbage collections.
require 'timeout'; require 'digest/sha1'; Digest::SHA1.hexdigest('')
q = Queue.new; done = Queue.new
ws = 3.times.map { |id| Thread.new { while (j = q.pop) != :end; h = {}; 60000.times { |i| h[(i * j) % 1009] = (i ^ j).to_s(2) }; done << [j, Digest::SHA1.hexdigest(h.sort.flatten.join)[0, 10]]; end } }
15.times do |r|
  6.times { |k| q << r * 6 + k + 1 }
  res = 6.times.map { done.pop }.sort
  to = begin; Timeout.timeout(0.02) { sleep 1 }; rescue Timeout::Error; 'timeout'; end
  puts "#{r} #{res.map(&:last).join(' ')} #{to}"
  GC.start if r % 5 == 4
end
3.times { q << :end }; ws.each(&:join)
